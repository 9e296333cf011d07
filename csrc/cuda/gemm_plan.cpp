#include "gemm_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "layout.cuh"

namespace mmq::cuda {
namespace {

constexpr int kLeastUnits = 2;  // of a share: less does not pay for adding up its partial sums

int fewest_token_tiles(int64_t m) {
    return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 11;
}

// Words of each warp, x, scales of each warp, zero points of each warp.
void lay_out_stage(const GemmArgs& args, GemmPlan& plan) {
    const int warps = kGemmThreads / 32, bits = args.weight.bits;
    plan.warp_scale_bytes = plan.groups_per_tile * kTileSide * plan.scale_bytes;
    plan.warp_zero_bytes = plan.groups_per_tile * 8 * bits;
    plan.scales_at = kGemmRows * kTileSide * bits / 8 + 8 * plan.token_tiles * kTileSide * 2;
    plan.zeros_at = plan.scales_at + warps * plan.warp_scale_bytes;
    plan.stage_bytes = static_cast<int>(ceil_div(plan.zeros_at + warps * plan.warp_zero_bytes, 128)) * 128;
}

// What the tile on its way to y takes: fp32, rows of 4 more than it has.
int epilogue_bytes(int token_tiles) {
    return 4 * 8 * token_tiles * (kGemmRows + 4);
}

bool aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Shared memory of one block if `token_tiles` is to run at its occupancy.
int shared_share(const DeviceLimits& limits, int token_tiles) {
    const int blocks = blocks_per_multiprocessor(token_tiles);
    const int reserved = 1024;  // by the system, for each block
    return std::min(limits.shared_per_block, limits.shared_per_multiprocessor / blocks - reserved);
}

// Rounded up, so that the product with any column / 16 below 2^32 / (group_size / 16) is exact where it is cut off.
uint64_t group_magic(const Weight& weight) {
    if (weight.group_size >= weight.k) return 0;
    const uint64_t steps = static_cast<uint64_t>(weight.group_size) / kMmaColumns;
    if (static_cast<uint64_t>(weight.k) * steps >= uint64_t{1} << 35)
        throw std::invalid_argument("k * group_size must be below 2^39, got k = " + std::to_string(weight.k));
    return steps == 1 ? uint64_t{1} << 32 : (uint64_t{1} << 32) / steps + 1;
}

void choose_tile(const GemmArgs& args, const DeviceLimits& limits, GemmPlan& plan) {
    for (int token_tiles : {11, 4, 2, 1}) {
        if (token_tiles > fewest_token_tiles(args.m)) continue;
        plan.token_tiles = token_tiles;
        lay_out_stage(args, plan);
        const int fitting = shared_share(limits, token_tiles) / plan.stage_bytes;
        plan.stages = fitting >= 6 ? 6 : std::max(2, std::min(4, fitting));
        plan.shared_bytes = std::max(plan.stages * plan.stage_bytes, epilogue_bytes(token_tiles));
        if (plan.shared_bytes <= limits.shared_per_block) return;
    }
    throw std::invalid_argument("shared memory of a block must be at least " +
                                std::to_string(plan.shared_bytes) + " bytes, got " +
                                std::to_string(limits.shared_per_block));
}

void deal_out(const DeviceLimits& limits, GemmPlan& plan) {
    const int wave = limits.multiprocessors * blocks_per_multiprocessor(plan.token_tiles);
    plan.whole_tiles = plan.tiles / wave * wave;
    const int rest = plan.tiles - plan.whole_tiles;
    const int64_t units = static_cast<int64_t>(rest) * plan.units;
    plan.sharers = static_cast<int>(std::max<int64_t>(rest, std::min<int64_t>(wave, units / kLeastUnits)));
    if (8 * rest >= 7 * wave) plan.sharers = rest;  // nearly a wave: nothing to gain by cutting tiles
    plan.blocks = plan.whole_tiles > 0 ? wave : plan.sharers;
    const bool cut = plan.sharers > rest;
    plan.counters = cut ? rest : 0;
    plan.partial_floats = cut ? int64_t{2} * plan.sharers * 8 * plan.token_tiles * kGemmRows : 0;
}

}  // namespace

GemmPlan gemm_plan(const GemmArgs& args, const DeviceLimits& limits) {
    const Weight& weight = args.weight;
    GemmPlan plan{};
    const bool one_group = weight.group_size >= weight.k || weight.group_size % kTileSide == 0;
    plan.group_magic = group_magic(weight);
    plan.groups_per_tile = one_group ? 1 : static_cast<int>(2 + 32 / weight.group_size);
    plan.scale_bytes = weight.scale_dtype == Dtype::kFloat32 ? 4 : 2;
    plan.direct = args.perm == nullptr && args.input_scale == nullptr && weight.k % 8 == 0 && aligned(args.x);
    plan.aligned_rows = weight.n % 8 == 0 && aligned(args.y);
    choose_tile(args, limits, plan);
    plan.units = plan.k_tiles = static_cast<int>(tile_count(weight.k));
    plan.row_tiles = static_cast<int>(tile_count(weight.n));
    plan.scale_row_bytes = static_cast<uint32_t>(plan.row_tiles * kTileSide * plan.scale_bytes);
    plan.zero_row_bytes = static_cast<uint32_t>(plan.row_tiles * 8 * weight.bits);
    plan.token_blocks = static_cast<int>(ceil_div(args.m, 8 * plan.token_tiles));
    plan.tiles = static_cast<int>(ceil_div(weight.n, kGemmRows)) * plan.token_blocks;
    deal_out(limits, plan);
    return plan;
}

}  // namespace mmq::cuda
