// A register of 16 rows as two AVX2 registers. Included inside an anonymous namespace of a kernel file,
// which has regions.h.

struct F16 {
    __m256 lo, hi;
};
struct I16 {
    __m256i lo, hi;
};

constexpr int kRegisters = 2;  // of 16 rows
constexpr int kTokens = 6;     // 12 accumulators, 2 registers of weights, 1 of x: 15 of 16

MMQ_PART_OF_LOOP F16 set1(float value) {
    const __m256 v = _mm256_set1_ps(value);
    return {v, v};
}
MMQ_PART_OF_LOOP F16 load(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
MMQ_PART_OF_LOOP void store(float* to, F16 a) {
    _mm256_storeu_ps(to, a.lo);
    _mm256_storeu_ps(to + 8, a.hi);
}
MMQ_PART_OF_LOOP F16 add(F16 a, F16 b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F16 sub(F16 a, F16 b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F16 mul(F16 a, F16 b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F16 absolute(F16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
// max(a, b); b where a is no number.
inline F16 larger(F16 a, F16 b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
// Bit i: not a <= b in lane i.
inline uint32_t lanes_beyond(F16 a, F16 b) {
    const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLE_UQ));
    const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLE_UQ));
    return static_cast<uint32_t>(lo | hi << 8);
}
// a * b + c
MMQ_PART_OF_LOOP F16 fma(F16 a, F16 b, F16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// c - a * b
inline F16 fnma(F16 a, F16 b, F16 c) {
    return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}

inline I16 load_words(const int32_t* from) {
    const __m256i* p = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
}
inline I16 shift_right(I16 a, int count) {
    return {_mm256_srli_epi32(a.lo, count), _mm256_srli_epi32(a.hi, count)};
}
inline I16 shift_left(I16 a, int count) {
    return {_mm256_slli_epi32(a.lo, count), _mm256_slli_epi32(a.hi, count)};
}
inline I16 mask(I16 a, int32_t bits) {
    const __m256i m = _mm256_set1_epi32(bits);
    return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline I16 either(I16 a, I16 b) {
    return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
// Adds 128 to every byte, mod 256: codes in the highest bits of bytes become signed, centred on 0.
inline I16 centre_bytes(I16 a) {
    const __m256i top = _mm256_set1_epi32(static_cast<int>(0x80808080u));
    return {_mm256_xor_si256(a.lo, top), _mm256_xor_si256(a.hi, top)};
}
// The highest BITS bits of byte i of each lane, as a signed number.
template <int BITS>
inline I16 top_of_byte(I16 a, int i) {
    return {_mm256_srai_epi32(_mm256_slli_epi32(a.lo, 24 - 8 * i), 32 - BITS),
            _mm256_srai_epi32(_mm256_slli_epi32(a.hi, 24 - 8 * i), 32 - BITS)};
}
inline F16 to_float(I16 a) {
    return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}

inline F16 load_fp16(const uint16_t* from) {
    const __m128i* p = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p + 1))};
}
inline __m256 widen_bf16(__m128i half) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline F16 load_bf16(const uint16_t* from) {
    const __m128i* p = reinterpret_cast<const __m128i*>(from);
    return {widen_bf16(_mm_loadu_si128(p)), widen_bf16(_mm_loadu_si128(p + 1))};
}

// The COUNT bytes at `from`, 4 to 16. By loads that overlap: put together in memory, they would wait for their own stores.
template <int COUNT>
inline __m128i load_bytes(const uint8_t* from) {
    const auto word = [&](auto as, int at) {
        std::memcpy(&as, from + at, sizeof as);
        return as;
    };
    if constexpr (COUNT < 8) {
        const uint64_t low = word(uint32_t(), 0), high = word(uint32_t(), COUNT - 4);
        return _mm_cvtsi64_si128(static_cast<int64_t>(low | high << (8 * (COUNT - 4))));
    } else {
        const uint64_t low = word(uint64_t(), 0), high = word(uint64_t(), COUNT - 8);
        return _mm_set_epi64x(COUNT == 8 ? 0 : static_cast<int64_t>(high >> (8 * (16 - COUNT) % 64)),
                              static_cast<int64_t>(low));
    }
}

// 16 codes of a dense stream that starts at a byte: each lane fetches the two bytes its code touches.
template <int BITS>
inline F16 load_stream(const uint8_t* from) {
    const __m256i all = _mm256_broadcastsi128_si256(load_bytes<2 * BITS>(from));
    const __m256i* f = reinterpret_cast<const __m256i*>(kStreamFetch<BITS>.byte);
    const __m256i* s = reinterpret_cast<const __m256i*>(kStreamFetch<BITS>.shift);
    const I16 windows = {_mm256_srlv_epi32(_mm256_shuffle_epi8(all, f[0]), s[0]),
                         _mm256_srlv_epi32(_mm256_shuffle_epi8(all, f[1]), s[1])};
    return to_float(mask(windows, (1 << BITS) - 1));
}
