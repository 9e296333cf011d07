// Packed words -> operand A of the tensor cores: the integers q - zero, exact in fp16 and bf16; scales come later, in
// fp32, so that a weight is never rounded.
//
// A field OR-ed under the exponent of a power of two M is the number M + 2^shift q; one fma with 2^-shift and
// -(M 2^-shift + zero) leaves q - zero. fp16 has M = 1024 and room for 10 bits; bf16 M = 128 and 7 bits, so that a field
// too far left is rotated to shift 0; bf16 with 8 bits goes through fp32.
//
// Idea of the magic number: Kim et al., arXiv 2211.10017; of decoding into fragments: Marlin (Frantar et al., 2024).
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

namespace mmq {

template <class T>
struct Magic;

template <>
struct Magic<Half> {
    static constexpr uint32_t kBoth = 0x64006400, kMinusOne = 0xBC00BC00;  // 1024, -1
    static constexpr int kMantissa = 10;
    // 2^-shift, and -1024 * 2^-shift
    __device__ static constexpr uint32_t power(int shift) { return (0x3C00u - 0x400u * shift) * 0x10001u; }
    __device__ static constexpr uint32_t minus(int shift) { return (0xE400u - 0x400u * shift) * 0x10001u; }
};

template <>
struct Magic<BFloat> {
    static constexpr uint32_t kBoth = 0x43004300, kMinusOne = 0xBF80BF80;  // 128, -1
    static constexpr int kMantissa = 7;
    __device__ static constexpr uint32_t power(int shift) { return (0x3F80u - 0x80u * shift) * 0x10001u; }
    __device__ static constexpr uint32_t minus(int shift) { return (0xC300u - 0x80u * shift) * 0x10001u; }
};

template <class T, int kBits>
struct Decoder {
    static constexpr bool kThroughFloat = kBits > Magic<T>::kMantissa;
    static constexpr float kFloatMagic = 8388608.0f;  // 2^23: the lowest mantissa bit is 1

    // What `pair` wants of a zero point: minus it, twice, or 2^23 + it as a float.
    __device__ static __forceinline__ uint32_t operand(uint32_t zero) {
        if constexpr (kThroughFloat) {
            return bitcast<uint32_t>(kFloatMagic + static_cast<float>(zero));
        } else {
            return fma2<T>(zero * 0x10001u | Magic<T>::kBoth, Magic<T>::kMinusOne,
                           Magic<T>::minus(0) ^ 0x80008000u);
        }
    }

    // q - zero of both codes of pair kPair; `words` are the kBits words of a row tile.
    template <int kPair>
    __device__ static __forceinline__ uint32_t pair(const uint32_t (&words)[kBits], uint32_t zero) {
        if constexpr (kThroughFloat) {
            const uint32_t word = words[pair_word(8, kPair)];
            constexpr uint32_t kByte = pair_position(8, 8, 0, kPair) / 8;
            const float first = bitcast<float>(pick_bytes(word, 0x4B000000u, 0x7440u | kByte));
            const float second = bitcast<float>(pick_bytes(word, 0x4B000000u, 0x7440u | (kByte + 2) % 4));
            const float minus = bitcast<float>(zero);
            // Integers of at most 8 bits: the upper half of a float is all of it.
            return pick_bytes(bitcast<uint32_t>(first - minus), bitcast<uint32_t>(second - minus), 0x7632u);
        } else {
            constexpr bool kFits = pair_shift(kBits, kPair) + kBits <= Magic<T>::kMantissa;
            constexpr int kShift = kFits ? pair_shift(kBits, kPair) : 0;
            constexpr Planes planes = planes_of(kBits);
            uint32_t value = Magic<T>::kBoth;
#pragma unroll
            for (int p = 0; p < planes.count; ++p) {
                const int width = planes.width[p], low = planes.low[p];
                const int rotation = pair_rotation(kBits, width, kPair) + pair_shift(kBits, kPair) - kShift;
                const uint32_t word = words[low + pair_word(width, kPair)];
                const uint32_t mask = ((1u << width) - 1u) << (kShift + low);
                value = and_or(funnel_right(word, word, rotation), mask * 0x10001u, value);
            }
            return fma2<T>(value, Magic<T>::power(kShift),
                           fma2<T>(Magic<T>::minus(kShift), Magic<T>::power(0), zero));
        }
    }

    // Registers of operand A for step kStep; zeros of the rows g and g + 8.
    template <int kStep>
    __device__ static __forceinline__ void fragment(const uint32_t (&words)[kBits], uint32_t zero,
                                                    uint32_t zero_8, uint32_t (&a)[4]) {
        a[0] = pair<4 * kStep>(words, zero);
        a[1] = pair<4 * kStep + 1>(words, zero_8);
        a[2] = pair<4 * kStep + 2>(words, zero);
        a[3] = pair<4 * kStep + 3>(words, zero_8);
    }
};

}  // namespace mmq
