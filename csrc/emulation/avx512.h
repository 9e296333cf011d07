// The instructions of AVX-512 that csrc/cpu uses, in AVX2 and plain C++: what they compute, not how fast. Its sources take
// this header in place of their `#pragma GCC target`, so that they run, and are tested, on a CPU without AVX-512. Inside
// namespace mmq these names hide those of <immintrin.h>, of which only the types are used.
//
// They follow the manuals of Intel, but for two whose last bits are our own: _mm512_dpbf16_ps rounds each of its two
// additions and keeps subnormals, _mm512_reduce_add_pd adds from the first to the last. No CPU was asked.
#pragma once

#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../common/half.h"

// GCC warns that registers of 64 bytes are passed as they are not where there is AVX-512.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx2,fma,f16c")

// Called: inlined, the unrolled loops would compile for minutes.
#define MMQ_CALLED __attribute__((noinline))

namespace mmq {
namespace emulated {

template <class T>
using Lanes = std::array<T, 64 / sizeof(T)>;

template <class To, class From>
inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class T, class Register>
inline Lanes<T> lanes(const Register& of) {
    return bits_as<Lanes<T>>(of);
}

// value(i) in each lane i of type T
template <class T, class Register, class Value>
inline Register each_lane(Value value) {
    std::array<T, sizeof(Register) / sizeof(T)> result;
    for (size_t i = 0; i < result.size(); ++i) result[i] = static_cast<T>(value(i));
    return bits_as<Register>(result);
}

// The two halves, as AVX2 has them, through a function of AVX2.
template <class Half, class To, class Function, class... From>
inline To by_halves(Function function, const From&... from) {
    const auto half = [](const auto& of, int h) {
        Half part;
        std::memcpy(&part, reinterpret_cast<const char*>(&of) + h * sizeof part, sizeof part);
        return part;
    };
    const auto low = function(half(from, 0)...), high = function(half(from, 1)...);
    To to;
    std::memcpy(&to, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&to) + sizeof low, &high, sizeof high);
    return to;
}

// Lanes outside of the mask are not read: they are zeros.
template <class T, class Register>
inline Register masked_load(uint64_t mask, const void* from) {
    return each_lane<T, Register>([&](size_t i) {
        T value = 0;
        if (mask >> i & 1)
            std::memcpy(&value, static_cast<const char*>(from) + i * sizeof value, sizeof value);
        return value;
    });
}

template <class Register>
inline Register load(const void* from) {
    Register to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// What faults on the hardware.
inline const void* aligned(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 64 != 0) std::abort();
    return at;
}

}  // namespace emulated

// Integer instructions that AVX2 has under the same name, for half the register.
#define MMQ_OF_TWO(NAME)                                                     \
    MMQ_CALLED inline __m512i _mm512_##NAME(__m512i a, __m512i b) {          \
        return emulated::by_halves<__m256i, __m512i>(                        \
            [](__m256i x, __m256i y) { return _mm256_##NAME(x, y); }, a, b); \
    }
#define MMQ_SHIFT(NAME)                                                                  \
    MMQ_CALLED inline __m512i _mm512_##NAME(__m512i a, unsigned by) {                    \
        return emulated::by_halves<__m256i, __m512i>(                                    \
            [&](__m256i half) { return _mm256_##NAME(half, static_cast<int>(by)); }, a); \
    }

// --- memory ---

MMQ_CALLED inline __m512 _mm512_loadu_ps(const void* from) {
    return emulated::load<__m512>(from);
}
MMQ_CALLED inline __m512 _mm512_load_ps(const void* from) {
    return emulated::load<__m512>(emulated::aligned(from));
}
MMQ_CALLED inline __m512i _mm512_loadu_si512(const void* from) {
    return emulated::load<__m512i>(from);
}
MMQ_CALLED inline __m512i _mm512_load_si512(const void* from) {
    return emulated::load<__m512i>(emulated::aligned(from));
}
MMQ_CALLED inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
    return emulated::masked_load<float, __m512>(mask, from);
}
MMQ_CALLED inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
    return emulated::masked_load<uint16_t, __m512i>(mask, from);
}
MMQ_CALLED inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* from) {
    return emulated::masked_load<uint32_t, __m512i>(mask, from);
}
MMQ_CALLED inline __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* from) {
    return emulated::masked_load<uint8_t, __m128i>(mask, from);
}
MMQ_CALLED inline void _mm512_storeu_ps(void* to, __m512 a) {
    std::memcpy(to, &a, sizeof a);
}
MMQ_CALLED inline void _mm512_storeu_si512(void* to, __m512i a) {
    std::memcpy(to, &a, sizeof a);
}
MMQ_CALLED inline void _mm512_store_si512(void* to, __m512i a) {
    emulated::aligned(to);
    std::memcpy(to, &a, sizeof a);
}
MMQ_CALLED inline void _mm_mask_storeu_epi32(void* to, __mmask8 mask, __m128i a) {
    for (int i = 0; i < 4; ++i)
        if (mask >> i & 1)
            std::memcpy(static_cast<char*>(to) + 4 * i, reinterpret_cast<char*>(&a) + 4 * i, 4);
}

// --- constants, casts, halves ---

MMQ_CALLED inline __m512 _mm512_set1_ps(float value) {
    return emulated::each_lane<float, __m512>([&](size_t) { return value; });
}
MMQ_CALLED inline __m512i _mm512_set1_epi32(int value) {
    return emulated::each_lane<int32_t, __m512i>([&](size_t) { return value; });
}
MMQ_CALLED inline __m512i _mm512_set1_epi16(short value) {
    return emulated::each_lane<int16_t, __m512i>([&](size_t) { return value; });
}
MMQ_CALLED inline __m512i _mm512_set1_epi8(char value) {
    return emulated::each_lane<char, __m512i>([&](size_t) { return value; });
}
MMQ_CALLED inline __m512 _mm512_setzero_ps() {
    return __m512{};
}
MMQ_CALLED inline __m512d _mm512_setzero_pd() {
    return __m512d{};
}
MMQ_CALLED inline __m512i _mm512_setzero_si512() {
    return __m512i{};
}
MMQ_CALLED inline __m512 _mm512_castsi512_ps(__m512i a) {
    return (__m512)a;
}
MMQ_CALLED inline __m512i _mm512_castps_si512(__m512 a) {
    return (__m512i)a;
}
MMQ_CALLED inline __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
    return emulated::load<__m256i>(reinterpret_cast<const char*>(&a) + 32 * half);
}
MMQ_CALLED inline __m128i _mm512_extracti32x4_epi32(__m512i a, int quarter) {
    return emulated::load<__m128i>(reinterpret_cast<const char*>(&a) + 16 * quarter);
}
MMQ_CALLED inline __m256i _mm512_castsi512_si256(__m512i a) {
    return _mm512_extracti64x4_epi64(a, 0);
}
MMQ_CALLED inline __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
    std::memcpy(reinterpret_cast<char*>(&a) + 32 * half, &b, sizeof b);
    return a;
}
MMQ_CALLED inline __m512i _mm512_castsi256_si512(__m256i a) {
    return _mm512_inserti64x4(__m512i{}, a, 0);
}
MMQ_CALLED inline __m512i _mm512_broadcast_i32x4(__m128i a) {
    const auto quarter = emulated::bits_as<std::array<uint32_t, 4>>(a);
    return emulated::each_lane<uint32_t, __m512i>([&](size_t i) { return quarter[i % 4]; });
}

// --- floats ---

MMQ_CALLED inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    return a + b;
}
MMQ_CALLED inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
    return a - b;
}
MMQ_CALLED inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    return a * b;
}
MMQ_CALLED inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated::by_halves<__m256, __m512>(
        [](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
MMQ_CALLED inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated::by_halves<__m256, __m512>(
        [](__m256 x, __m256 y, __m256 z) { return _mm256_fnmadd_ps(x, y, z); }, a, b, c);
}
MMQ_CALLED inline __m512 _mm512_maskz_sub_ps(__mmask16 mask, __m512 a, __m512 b) {
    const auto difference = emulated::lanes<float>(a - b);
    return emulated::each_lane<float, __m512>([&](size_t i) { return mask >> i & 1 ? difference[i] : 0.0f; });
}
// Of all kinds only those that are asked for: quiet NaN, both infinities, signalling NaN.
MMQ_CALLED inline __mmask16 _mm512_fpclass_ps_mask(__m512 a, int kinds) {
    if (kinds != 0x99) std::abort();
    const auto value = emulated::lanes<float>(a);
    unsigned mask = 0;
    for (size_t i = 0; i < value.size(); ++i) mask |= (std::isfinite(value[i]) ? 0u : 1u) << i;
    return static_cast<__mmask16>(mask);
}
MMQ_CALLED inline __m512d _mm512_add_pd(__m512d a, __m512d b) {
    return a + b;
}
MMQ_CALLED inline double _mm512_reduce_add_pd(__m512d a) {
    double sum = 0;
    for (double value : emulated::lanes<double>(a)) sum += value;
    return sum;
}

// --- conversions ---

MMQ_CALLED inline __m512d _mm512_cvtps_pd(__m256 a) {
    const auto value = emulated::bits_as<std::array<float, 8>>(a);
    return emulated::each_lane<double, __m512d>([&](size_t i) { return value[i]; });
}
MMQ_CALLED inline __m512 _mm512_cvtph_ps(__m256i a) {
    return emulated::by_halves<__m128i, __m512>([](__m128i half) { return _mm256_cvtph_ps(half); }, a);
}
MMQ_CALLED inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    return emulated::by_halves<__m256i, __m512>([](__m256i half) { return _mm256_cvtepi32_ps(half); }, a);
}
MMQ_CALLED inline __m512i _mm512_cvtps_epi32(__m512 a) {
    return emulated::by_halves<__m256, __m512i>([](__m256 half) { return _mm256_cvtps_epi32(half); }, a);
}
MMQ_CALLED inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return emulated::by_halves<__m128i, __m512i>([](__m128i half) { return _mm256_cvtepu16_epi32(half); }, a);
}
MMQ_CALLED inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
    const auto value = emulated::lanes<uint32_t>(a);
    return emulated::each_lane<uint16_t, __m256i>([&](size_t i) { return value[i]; });
}

// --- integers ---

MMQ_CALLED inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return a & b;
}
MMQ_CALLED inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
    return a | b;
}
MMQ_CALLED inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
    return a ^ b;
}
// Bit i of `table` is the result where a, b, c are the bits of i, a the highest.
MMQ_CALLED inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    __m512i result{};
    for (int i = 0; i < 8; ++i)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}
MMQ_SHIFT(srli_epi32)
MMQ_SHIFT(slli_epi32)
MMQ_SHIFT(srai_epi32)
MMQ_OF_TWO(srlv_epi32)
MMQ_OF_TWO(add_epi32)
MMQ_OF_TWO(mullo_epi32)
MMQ_CALLED inline __mmask32 _mm512_test_epi16_mask(__m512i a, __m512i b) {
    const auto both = emulated::lanes<uint16_t>(a & b);
    uint32_t mask = 0;
    for (size_t i = 0; i < both.size(); ++i) mask |= (both[i] != 0 ? 1u : 0u) << i;
    return mask;
}
MMQ_CALLED inline __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i outside, __m512i inside) {
    const auto a = emulated::lanes<uint16_t>(outside), b = emulated::lanes<uint16_t>(inside);
    return emulated::each_lane<uint16_t, __m512i>([&](size_t i) { return mask >> i & 1 ? b[i] : a[i]; });
}

// --- lanes elsewhere ---

MMQ_CALLED inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
    const auto from = emulated::lanes<uint32_t>(index);
    const auto table = emulated::lanes<float>(a);
    return emulated::each_lane<float, __m512>([&](size_t i) { return table[from[i] % 16]; });
}
MMQ_CALLED inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
    const auto from = emulated::lanes<uint16_t>(index), table = emulated::lanes<uint16_t>(a);
    return emulated::each_lane<uint16_t, __m512i>([&](size_t i) { return table[from[i] % 32]; });
}
MMQ_CALLED inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    const auto from = emulated::lanes<uint16_t>(index);
    const auto first = emulated::lanes<uint16_t>(a), second = emulated::lanes<uint16_t>(b);
    return emulated::each_lane<uint16_t, __m512i>(
        [&](size_t i) { return (from[i] & 32 ? second : first)[from[i] % 32]; });
}
MMQ_OF_TWO(shuffle_epi8)
MMQ_OF_TWO(unpacklo_epi32)
MMQ_OF_TWO(unpackhi_epi32)
MMQ_OF_TWO(unpacklo_epi64)
MMQ_OF_TWO(unpackhi_epi64)

// --- dot products ---

MMQ_OF_TWO(maddubs_epi16)
MMQ_OF_TWO(madd_epi16)
MMQ_CALLED inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    const auto acc = emulated::lanes<int32_t>(sum);
    const auto x = emulated::lanes<uint8_t>(a);
    const auto y = emulated::lanes<int8_t>(b);
    return emulated::each_lane<int32_t, __m512i>([&](size_t i) {
        int32_t result = acc[i];
        for (size_t j = 4 * i; j < 4 * i + 4; ++j) result += x[j] * y[j];
        return result;
    });
}
MMQ_CALLED inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const auto acc = emulated::lanes<float>(sum);
    const auto x = emulated::lanes<uint16_t>(a), y = emulated::lanes<uint16_t>(b);
    return emulated::each_lane<float, __m512>([&](size_t i) {
        float result = acc[i];
        for (size_t j : {2 * i + 1, 2 * i})
            result = std::fma(bf16_to_float(x[j]), bf16_to_float(y[j]), result);
        return result;
    });
}

#undef MMQ_OF_TWO
#undef MMQ_SHIFT

}  // namespace mmq
