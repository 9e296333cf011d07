// A register of 16 rows as one AVX-512 register. Included inside an anonymous namespace of a kernel file.

using F16 = __m512;
using I16 = __m512i;

constexpr int kRegisters = 1;  // of 16 rows
constexpr int kTokens = 24;    // sums in registers, of 32

inline F16 set1(float value) {
    return _mm512_set1_ps(value);
}
inline F16 load(const float* from) {
    return _mm512_loadu_ps(from);
}
inline void store(float* to, F16 a) {
    _mm512_storeu_ps(to, a);
}
inline F16 add(F16 a, F16 b) {
    return _mm512_add_ps(a, b);
}
inline F16 sub(F16 a, F16 b) {
    return _mm512_sub_ps(a, b);
}
inline F16 mul(F16 a, F16 b) {
    return _mm512_mul_ps(a, b);
}
// a * b + c
inline F16 fma(F16 a, F16 b, F16 c) {
    return _mm512_fmadd_ps(a, b, c);
}
// c - a * b
inline F16 fnma(F16 a, F16 b, F16 c) {
    return _mm512_fnmadd_ps(a, b, c);
}

inline I16 load_words(const int32_t* from) {
    return _mm512_loadu_si512(from);
}
inline I16 shift_right(I16 a, int count) {
    return _mm512_srli_epi32(a, static_cast<unsigned>(count));
}
inline I16 shift_left(I16 a, int count) {
    return _mm512_slli_epi32(a, static_cast<unsigned>(count));
}
inline I16 mask(I16 a, int32_t bits) {
    return _mm512_and_si512(a, _mm512_set1_epi32(bits));
}
inline I16 either(I16 a, I16 b) {
    return _mm512_or_si512(a, b);
}
// Adds 128 to every byte, mod 256: codes in the highest bits of bytes become signed, centred on 0.
inline I16 centre_bytes(I16 a) {
    return _mm512_xor_si512(a, _mm512_set1_epi32(static_cast<int>(0x80808080u)));
}
// The highest BITS bits of byte i of each lane, as a signed number.
template <int BITS>
inline I16 top_of_byte(I16 a, int i) {
    return _mm512_srai_epi32(_mm512_slli_epi32(a, static_cast<unsigned>(24 - 8 * i)), 32 - BITS);
}
inline F16 to_float(I16 a) {
    return _mm512_cvtepi32_ps(a);
}
// table[index mod 16] of each lane: only the low 4 bits of an index count, so fields above them need no mask.
inline F16 look_up(const float* table, I16 index) {
    return _mm512_permutexvar_ps(index, _mm512_load_ps(table));
}

inline F16 load_fp16(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline F16 load_bf16(const uint16_t* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 16 codes of a dense stream that starts at a byte: each lane fetches the two bytes its code touches.
template <int BITS>
inline F16 load_stream(const uint8_t* from) {
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << (2 * BITS)) - 1), from);
    const __m512i window =
        _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), _mm512_load_si512(kStreamFetch<BITS>.byte));
    const __m512i code = _mm512_srlv_epi32(window, _mm512_load_si512(kStreamFetch<BITS>.shift));
    return to_float(mask(code, (1 << BITS) - 1));
}
