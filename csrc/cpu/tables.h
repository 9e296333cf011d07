// Constants of the vector code: which bytes a code of a stream touches, and what a field of a plane is worth.
#pragma once

#include <cstdint>

#include "../common/layout.h"

namespace mmq {

// Lane i of 16 wants code i of a dense stream: its two bytes, then a shift. A lane is 4 bytes; 0x80 gives 0.
template <int BITS>
struct StreamFetch {
    alignas(64) uint8_t byte[64] = {};
    alignas(64) int32_t shift[16] = {};

    constexpr StreamFetch() {
        for (int i = 0; i < 16; ++i) {
            const int first = i * BITS / 8;
            byte[4 * i] = static_cast<uint8_t>(first);
            byte[4 * i + 1] = static_cast<uint8_t>(first + 1 < 2 * BITS ? first + 1 : 0x80);
            byte[4 * i + 2] = byte[4 * i + 3] = 0x80;
            shift[i] = i * BITS % 8;
        }
    }
};

template <int BITS>
inline constexpr StreamFetch<BITS> kStreamFetch{};

// Entry i is worth (i mod 2^BITS) - 2^(BITS-1): periodic, so that an index of 4 bits needs no mask.
template <int BITS>
struct CentredTable {
    alignas(64) float value[16] = {};

    constexpr CentredTable() {
        for (int i = 0; i < 16; ++i)
            value[i] = static_cast<float>((i & ((1 << BITS) - 1)) - middle_code(BITS));
    }
};

template <int BITS>
inline constexpr CentredTable<BITS> kCentredTable{};

// bf16 of an integer of at most 8 bits, at compile time.
constexpr uint16_t exact_bf16(int value) {
    if (value == 0) return 0;
    const unsigned magnitude = static_cast<unsigned>(value < 0 ? -value : value);
    int exponent = 7;
    while (!(magnitude >> exponent & 1)) --exponent;
    const unsigned mantissa = (magnitude << (7 - exponent)) & 0x7f;
    return static_cast<uint16_t>((value < 0 ? 0x8000u : 0u) | (static_cast<unsigned>(127 + exponent) << 7) |
                                 mantissa);
}

}  // namespace mmq
