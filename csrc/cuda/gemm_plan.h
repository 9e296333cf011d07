// How a product is cut into blocks: a pure function of the sizes and of the GPU.
#pragma once

#include "args.h"
#include "device.h"

namespace mmq::cuda {

constexpr int kGemmThreads = 256;
constexpr int kGemmRows = 256;  // rows of W that a block takes

// Blocks that a multiprocessor runs at a time: what their registers allow.
MMQ_BOTH constexpr int blocks_per_multiprocessor(int token_tiles) {
    return token_tiles == 1 ? 2 : 1;
}

struct GemmPlan {
    int token_tiles;         // 8-token tiles of a block: 1, 2, 4 or 11
    int token_blocks;        // blocks along the tokens
    int tiles;               // output tiles in all, token blocks running fastest
    int whole_tiles;         // of them, taken whole by one block each
    int blocks;              // grid
    int sharers;             // blocks that share the units of the remaining tiles
    int units;               // steps along k of one tile
    int row_tiles, k_tiles;  // tiles of the weight
    int stages;              // of shared memory: 2, 3, 4 or 6
    int stage_bytes;
    int scales_at, zeros_at;                   // where a stage's scales and zero points begin
    int warp_scale_bytes, warp_zero_bytes;     // of one warp in a stage
    uint32_t scale_row_bytes, zero_row_bytes;  // of one group in global memory
    int shared_bytes;                          // in all
    uint64_t group_magic;                      // group = (column / 16) * group_magic >> 32
    int groups_per_tile;                       // groups that 64 columns may touch
    int scale_bytes;                           // of one scale
    bool direct;                               // x is copied as it is; otherwise value by value
    bool aligned_rows;                         // rows of y begin at multiples of 16 bytes
    int64_t partial_floats;
    int counters;
};

// What a kernel gets.
struct GemmCall {
    GemmArgs args;
    GemmPlan plan;
};

// Reads sizes, types, group size and the alignment and presence of pointers of `args`.
// Throws std::invalid_argument where no tile fits the GPU's shared memory.
GemmPlan gemm_plan(const GemmArgs& args, const DeviceLimits& limits);

}  // namespace mmq::cuda
