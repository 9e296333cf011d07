// Codes from plane words by shift and table look-up. Included inside an anonymous namespace of a kernel file.

template <int BITS, int P>
inline F16 field_value(const I16* words, int c) {
    constexpr Planes kPlanes = planes_of(BITS);
    constexpr int kCentre = P == kPlanes.count - 1 ? middle_code(BITS) : 0;
    const I16 index = shift_right(words[P], field_bit(c, kPlanes.width[P]));
    return look_up(kFieldTable<kPlanes.width[P], kPlanes.low[P], kCentre>.value, index);
}

// q - 2^(BITS-1) of column c of a grain, for BITS < 8; words[p] begins at the grain's first field.
template <int BITS>
inline F16 centred_code(const I16* words, int c) {
    constexpr int kCount = planes_of(BITS).count;
    F16 value = field_value<BITS, 0>(words, c);
    if constexpr (kCount > 1) value = add(value, field_value<BITS, 1>(words, c));
    if constexpr (kCount > 2) value = add(value, field_value<BITS, 2>(words, c));
    return value;
}
