// Where the bits of a code lie: what `mmq_kernels/packing.py` states in torch, for host and device code.
//
//   stream (on disk)   int32 [n, ceil(k*bits/32)]; per row one LSB-first bit stream, code i at bit i*bits
//   planes             a code's bits split into planes of width 1, 2, 4 or 8, lowest bits first
//                      (7 = 4 + 2 + 1); a word of a plane of width p holds 32/p consecutive columns, lowest
//                      bits first; each plane is padded to whole words; R = sum over planes of ceil(k*p/32)
//   cpu                int32 [ceil(n/16), R, 16]: the planes with n tiled by 16, rows past n zero
//
// Kernels walk in units of 8 columns: 8*p bits never straddle a word of a plane (for p = 8 they are two
// words), and groups are multiples of 8, so a unit has one scale.
#pragma once

#include <cstdint>

#include "args.h"

namespace mmq {

constexpr int kTileRows = 16;    // rows of W in a tile of the cpu layout: one AVX-512 register
constexpr int kUnitColumns = 8;  // columns that a kernel decodes at a time
constexpr int kMaxPlanes = 3;

MMQ_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

struct Planes {
    int count;
    int width[kMaxPlanes];
    int low[kMaxPlanes];  // lowest bit of the code that the plane holds
};

MMQ_BOTH constexpr Planes planes_of(int bits) {
    switch (bits) {
        case 2:
            return {1, {2, 0, 0}, {0, 0, 0}};
        case 3:
            return {2, {2, 1, 0}, {0, 2, 0}};
        case 4:
            return {1, {4, 0, 0}, {0, 0, 0}};
        case 5:
            return {2, {4, 1, 0}, {0, 4, 0}};
        case 6:
            return {2, {4, 2, 0}, {0, 4, 0}};
        case 7:
            return {3, {4, 2, 1}, {0, 4, 6}};
        case 8:
            return {1, {8, 0, 0}, {0, 0, 0}};
        default:
            return {0, {0, 0, 0}, {0, 0, 0}};
    }
}

// 32-bit words of a dense stream of `count` codes.
MMQ_BOTH constexpr int64_t stream_words(int64_t count, int bits) {
    return ceil_div(count * bits, 32);
}

// 32-bit words of one plane of a row of k codes.
MMQ_BOTH constexpr int64_t plane_words(int64_t k, int width) {
    return ceil_div(k * width, 32);
}

// Word rows of all planes of k columns: R.
MMQ_BOTH constexpr int64_t word_rows(int64_t k, int bits) {
    const Planes planes = planes_of(bits);
    int64_t rows = 0;
    for (int p = 0; p < planes.count; ++p) rows += plane_words(k, planes.width[p]);
    return rows;
}

MMQ_BOTH constexpr int64_t tiles_of(int64_t n) {
    return ceil_div(n, kTileRows);
}

// The zero point of a symmetric weight, and the value that kernels centre codes on.
MMQ_BOTH constexpr int middle_code(int bits) {
    return 1 << (bits - 1);
}

}  // namespace mmq
