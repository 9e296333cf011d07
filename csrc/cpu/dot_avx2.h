// Dot products of 4 codes of 16 rows with 4 of a token, AVX2. Included inside an anonymous namespace after vec_avx2.h.

constexpr int kDotTiles = 1;
// Blocks of tokens that there are kernels for; of missing tokens all codes are 0.
constexpr int kDotBlocks[] = {1, 2, 3, 4, 5};

// Sums of pairs of products, in 16 bits, for as many steps as these hold: (2^BITS - 1) * 128 * 2 a step.
constexpr bool kPairSums = true;
template <int BITS>
constexpr int kPairSteps = BITS == 2                ? 32
                           : BITS == 3              ? 16
                           : BITS == 4 || BITS == 8 ? 8
                           : BITS == 5              ? 4
                           : BITS == 6              ? 2
                                                    : 1;
// 10 registers of sums, 2 of codes, 1 of x, 2 of products; with more, sums wait for memory at every step. Codes of 8 bits
// are two of 4.
template <int BITS>
constexpr int kMostStreams = BITS == 8 ? 2 : 5;

inline I16 set1_word(int32_t value) {
    const __m256i v = _mm256_set1_epi32(value);
    return {v, v};
}
inline I16 add_words(I16 a, I16 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I16 sub_words(I16 a, I16 b) {
    return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
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

// a, but at least `least` and at most `most`.
inline I16 clamped(I16 a, int32_t least, int32_t most) {
    const __m256i low = _mm256_set1_epi32(least), high = _mm256_set1_epi32(most);
    return {_mm256_min_epi32(_mm256_max_epi32(a.lo, low), high),
            _mm256_min_epi32(_mm256_max_epi32(a.hi, low), high)};
}

inline void store_words(int32_t* to, I16 a) {
    __m256i* p = reinterpret_cast<__m256i*>(to);
    _mm256_store_si256(p, a.lo);
    _mm256_store_si256(p + 1, a.hi);
}

// Of each four lanes: byte b of lane l becomes byte l of lane b.
inline I16 transposed_bytes(I16 a) {
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return {_mm256_shuffle_epi8(a.lo, order), _mm256_shuffle_epi8(a.hi, order)};
}

// Of each row the sums of products 0 + 1 and 2 + 3: codes of a weight unsigned and below 128, those of a stream signed.
inline I16 pair_products(I16 codes, I16 x) {
    return {_mm256_maddubs_epi16(codes.lo, x.lo), _mm256_maddubs_epi16(codes.hi, x.hi)};
}
// In the order of the calls: GCC would multiply first and add later, with sums by the dozen in memory.
inline I16 add_pairs(I16 a, I16 b) {
    I16 sum = {_mm256_add_epi16(a.lo, b.lo), _mm256_add_epi16(a.hi, b.hi)};
    asm("" : "+x"(sum.lo), "+x"(sum.hi));
    return sum;
}
// a, which is not to be loaded again from where it came from.
inline I16 kept(I16 a) {
    asm("" : "+x"(a.lo), "+x"(a.hi));
    return a;
}
// acc + worth * (both sums of pairs of each row)
inline I16 add_widened(I16 acc, I16 pairs, int16_t worth) {
    const __m256i times = _mm256_set1_epi16(worth);
    return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(pairs.lo, times)),
            _mm256_add_epi32(acc.hi, _mm256_madd_epi16(pairs.hi, times))};
}

// acc + the 4 products of each row.
template <int BITS>
inline I16 dot(I16 acc, I16 codes, I16 x) {
    if constexpr (BITS == 8) {
        acc = add_widened(acc, pair_products(mask(shift_right(codes, 4), 0x0f0f0f0f), x), 16);
        codes = mask(codes, 0x0f0f0f0f);
    }
    return add_widened(acc, pair_products(codes, x), 1);
}
