// Dot products of 4 codes of 16 rows with 4 of a token, AVX2. Included inside an anonymous namespace after vec_avx2.h.

constexpr int kDotTiles = 1;
constexpr int kDotTokens = 4;  // 8 accumulators, 2 registers of codes, 1 of x, the rest for sums of pairs

inline I16 set1_word(int32_t value) {
    const __m256i v = _mm256_set1_epi32(value);
    return {v, v};
}
inline I16 add_words(I16 a, I16 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I16 mul_words(I16 a, I16 b) {
    return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline I16 to_words(F16 a) {
    return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
// 4 codes of a token for every row.
inline I16 four_codes(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return set1_word(four);
}

// acc + the 4 products of 8 rows, through sums of pairs in 16 bits; those hold 2 * 127 * 127.
inline __m256i add_products(__m256i acc, __m256i codes, __m256i x, int16_t worth) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(worth)));
}

// acc + the 4 products of each row: codes of a weight unsigned, those of a token in [-127, 127].
template <int BITS>
inline I16 dot(I16 acc, I16 codes, I16 x) {
    if constexpr (BITS == 8) {
        const I16 top =
            mask(shift_right(codes, 7), 0x01010101);  // goes by itself: 255 * 127 twice is too much
        acc = {add_products(acc.lo, top.lo, x.lo, 128), add_products(acc.hi, top.hi, x.hi, 128)};
        codes = mask(codes, 0x7f7f7f7f);
    }
    return {add_products(acc.lo, codes.lo, x.lo, 1), add_products(acc.hi, codes.hi, x.hi, 1)};
}
