// Codes from the words of a plane by shift, mask and conversion. For the inside of an anonymous namespace.

// q - 2^(BITS-1) of column c of a grain, for codes of one plane; the word begins at the grain's first field.
template <int BITS>
inline F16 centred_code(const I16& word, int c) {
    const I16 code = mask(shift_right(word, field_bit(c, BITS)), (1 << BITS) - 1);
    return sub(to_float(code), set1(static_cast<float>(middle_code(BITS))));
}
