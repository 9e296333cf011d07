// The cuda layout of a weight: where each bit of each code lies, so that a lane's share of a tile is 16-byte loads and
// its codes come out of a word two by two, ready to be tensor-core operands.
//
//   tile      64 rows x 64 columns; tiles of a row of tiles follow each other along k:
//             uint4 [ceil(n/64), ceil(k/64), bits, 32 lanes]; 512 * bits bytes a tile; padding is zero
//   fragment  operand A of mma.m16n8k16: a tile is 4 row tiles x 4 steps of 16 columns. Lane 4g + t holds of row tile r
//             and step s the rows 16r + g and 16r + g + 8, columns 16s + {2t, 2t+1, 2t+8, 2t+9}: four pairs of codes
//   pairs     P = 4s + i, i the register of the fragment: row g + 8(i & 1), columns 2t + 8(i >> 1) and the next
//   words     of row tile r and the plane of width w that holds bits [low, low + w): w words, word P*w/16 of them;
//             the plane's 4w words of a lane (r major) are its vectors low .. low + w - 1
//
// Inside a word a pair's two fields stand 16 bits apart, at (position, position + 16), all modulo 32:
//
//   position = shift + low + rotation        shift(P): where the code stands in the mantissa when it is decoded
//
// Several pairs share a rotation and differ in shift, so that most fields are masked out of the word as it is. 4 bits:
//
//   bit   31..28 | 27..24 | 23..20 | 19..16 | 15..12 | 11..8 | 7..4 | 3..0        shift 0, 4, 0, 4; rotation 0, 0, 8, 8
//   pair     3b       2b       1b       0b      3a       2a     1a     0a         (a: even column, b: odd column)
//
// Scales: [groups, 64 * ceil(n/64)]; zero points: a dense stream of `bits` each, 2 * bits words a tile row of a group.
// Both in the order g*8 + i <-> row g + 8i of the 64, so that a lane's eight are one load.
#pragma once

#include "../common/layout.h"

namespace mmq {

constexpr int kTileSide = 64;    // rows and columns of a tile
constexpr int kMmaColumns = 16;  // columns of one mma
constexpr int kStepsPerTile = kTileSide / kMmaColumns;

MMQ_BOTH constexpr int64_t tile_count(int64_t size) {
    return ceil_div(size, kTileSide);
}

// How many shifts a width has: the fields of codes that share a rotation fill the 8 low bits of a half word.
MMQ_BOTH constexpr int shift_count(int bits) {
    return bits <= 3 ? 4 : bits <= 6 ? 2 : 1;
}

// Place of pair P's code in the mantissa: its lowest bit.
MMQ_BOTH constexpr int pair_shift(int bits, int pair) {
    return pair % shift_count(bits) * (8 / shift_count(bits));
}

// By how much the word of the plane of width `width` is rotated right for pair P.
MMQ_BOTH constexpr int pair_rotation(int bits, int width, int pair) {
    const int shifts = shift_count(bits), step = 8 / shifts;
    const int in_word = pair % (16 / width), next = in_word / shifts;
    return width * (next % (step / width)) + 8 * (next / (step / width));
}

// Word of pair P among the `width` words of a row tile in its plane.
MMQ_BOTH constexpr int pair_word(int width, int pair) {
    return pair * width / 16;
}

// Bit of a word where the field of the first (second: + 16 modulo 32) code of pair P begins.
MMQ_BOTH constexpr int pair_position(int bits, int width, int low, int pair) {
    return (pair_shift(bits, pair) + low + pair_rotation(bits, width, pair)) % 32;
}

// A code's place in a tile.
struct CodePlace {
    int lane, row_tile, pair, half;
};

MMQ_BOTH constexpr CodePlace place_of(int row, int column) {
    const int in_step = column % kMmaColumns;
    const int i = row % 16 / 8 + 2 * (in_step / 8);
    return {4 * (row % 8) + in_step % 8 / 2, row / 16, 4 * (column / kMmaColumns) + i, in_step % 2};
}

// Where among the 64 scales of a group that of a row stands; its own inverse.
MMQ_BOTH constexpr int scale_position(int row) {
    return row % 8 * 8 + row / 8;
}

}  // namespace mmq
