// Codes from the words of a plane by shift and table look-up. Included inside an anonymous namespace of a kernel file.

// q - 2^(BITS-1) of column c of a grain, for codes of one plane; the word begins at the grain's first field.
template <int BITS>
inline F16 centred_code(I16 word, int c) {
    return look_up(kCentredTable<BITS>.value, shift_right(word, field_bit(c, BITS)));
}
