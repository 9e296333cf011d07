// Codes from plane words by shift, mask and conversion. For the inside of an anonymous namespace.

// q - 2^(BITS-1) of column c of a grain, for BITS < 8; words[p] begins at the grain's first field.
template <int BITS>
inline F16 centred_code(const I16* words, int c) {
    constexpr Planes kPlanes = planes_of(BITS);
    I16 code = mask(shift_right(words[0], field_bit(c, kPlanes.width[0])), (1 << kPlanes.width[0]) - 1);
#pragma GCC unroll 3
    for (int p = 1; p < kPlanes.count; ++p) {
        const int width = kPlanes.width[p];
        code = either(code, shift_left(mask(shift_right(words[p], field_bit(c, width)), (1 << width) - 1),
                                       kPlanes.low[p]));
    }
    return sub(to_float(code), set1(static_cast<float>(middle_code(BITS))));
}
