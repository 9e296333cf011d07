// Dot products of 4 codes of 16 rows with 4 of a token, AVX-512. Included inside an anonymous namespace after
// vec_avx512.h; kVnni says whether there is one instruction for it.

constexpr int kDotTiles = 2;  // tiles that share each load of a token's codes
// Blocks of tokens that there are kernels for; of missing tokens all codes are 0.
constexpr int kDotBlocks[] = {1, 4, 8, 12};
template <int BITS>
constexpr int kMostStreams = 12;  // 24 accumulators, 2 registers of codes, 1 of x

// Products are added up in 32 bits.
constexpr bool kPairSums = false;
template <int BITS>
constexpr int kPairSteps = 0;

// As dot_avx2.h needs it.
inline I16 kept(I16 a) {
    return a;
}
inline I16 set1_word(int32_t value) {
    return _mm512_set1_epi32(value);
}
inline I16 add_words(I16 a, I16 b) {
    return _mm512_add_epi32(a, b);
}
inline I16 mul_words(I16 a, I16 b) {
    return _mm512_mullo_epi32(a, b);
}
inline I16 to_words(F16 a) {
    return _mm512_cvtps_epi32(a);
}
// 4 codes of a token for every row.
inline I16 four_codes(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
}

#if MMQ_VNNI
// acc + the 4 products of each row: codes of a weight unsigned, those of a token in [-127, 127].
template <int BITS>
inline I16 dot(I16 acc, I16 codes, I16 x) {
    return _mm512_dpbusd_epi32(acc, codes, x);
}
#else
// The same through sums of pairs in 16 bits, which hold 2 * 127 * 127: the top bit of 8 goes by itself.
template <int BITS>
inline I16 dot(I16 acc, I16 codes, I16 x) {
    if constexpr (BITS == 8) {
        const I16 top = mask(shift_right(codes, 7), 0x01010101);
        const I16 tops = _mm512_madd_epi16(_mm512_maddubs_epi16(top, x), _mm512_set1_epi16(128));
        acc = _mm512_add_epi32(acc, tops);
        codes = mask(codes, 0x7f7f7f7f);
    }
    const I16 pairs = _mm512_maddubs_epi16(codes, x);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif
