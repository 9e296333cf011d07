// Where the bits of a code lie: what `mmq_kernels/packing.py` states in torch, for host and device code.
//
//   stream (on disk)   int32 [n, ceil(k*bits/32)]; per row one LSB-first bit stream, code i at bit i*bits
//   planes             a code's bits split into planes of width 1, 2, 4 or 8, lowest bits first (7 = 4 + 2 + 1)
//   cpu                int32 [ceil(n/16), ceil(k/32), bits, 16]: tiles of 16 rows, units of 32 columns, and in a unit
//                      the words of all planes, one word of each row side by side; past n and k all is zero
//
// A unit is 8 steps of 4 consecutive columns. Column 4s + b of a unit has its field of a plane of width p, whose lowest
// bit in the code is `low`, in
//
//   word  low + p*s/8     (a plane takes p words of the unit)
//   bits  8*b + p*s%8 on  (byte b)
//
// so one shift and one mask give the fields of a step in the four bytes of a word, in order, for every plane alike; and
// a shift by 8*b + p*s%8 brings any one column down. Groups are multiples of 8 columns, two steps: kernels walk in
// grains of two steps, which have one scale.
#pragma once

#include <cstdint>

#include "args.h"

namespace mmq {

constexpr int kTileRows = 16;     // rows of W in a tile of the cpu layout: one AVX-512 register
constexpr int kUnitColumns = 32;  // columns that a plane of width p keeps in p words
constexpr int kStepColumns = 4;  // columns whose fields are the four bytes of a word after one shift and mask
constexpr int kGrainColumns = 8;  // group sizes are multiples of this: columns that surely share a scale
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

MMQ_BOTH constexpr int64_t units_of(int64_t k) {
    return ceil_div(k, kUnitColumns);
}

// Words of a row of the cpu layout.
MMQ_BOTH constexpr int64_t row_words(int64_t k, int bits) {
    return units_of(k) * bits;
}

// Where column c of a grain has its field of a plane, from the field of the first column on.
MMQ_BOTH constexpr int field_bit(int c, int width) {
    return 8 * (c % kStepColumns) + width * (c / kStepColumns);
}

MMQ_BOTH constexpr int64_t tiles_of(int64_t n) {
    return ceil_div(n, kTileRows);
}

// The zero point of a symmetric weight, and the value that kernels centre codes on.
MMQ_BOTH constexpr int middle_code(int bits) {
    return 1 << (bits - 1);
}

}  // namespace mmq
