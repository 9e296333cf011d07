// Round to nearest on min-max grids of groups of W[n, k]; grids and codes as common/grid.inl has them, bit for bit.
//
// A group belongs to 1..32 neighbouring lanes, 8 columns each at a time, so that a warp reads whole cache lines: groups
// of 16 take 2 lanes, of 128 take 16, longer ones a warp, which walks along. The second pass finds its values in L2.
#include "../common/half.h"
#include "../common/layout.h"
#include "kernels.h"
#include "ptx.cuh"
#include "runtime.cuh"

namespace mmq::cuda {
namespace {

#include "../common/grid.inl"

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a lane at a time

struct RtnCall {
    RtnArgs args;
    int lanes;  // of a group: a power of two
};

__device__ void load_columns(const RtnArgs& args, int64_t i, int count, float (&w)[kColumns]) {
    if (args.dtype == Dtype::kFloat32) {
        const float* from = static_cast<const float*>(args.weight) + i;
#pragma unroll
        for (int e = 0; e < kColumns; ++e) w[e] = e < count ? from[e] : 0.0f;
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(args.weight) + i;
    uint16_t bits[kColumns];
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && count == kColumns) {
        const uint4 all = *reinterpret_cast<const uint4*>(from);
        const uint32_t words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
        for (int e = 0; e < kColumns; ++e) bits[e] = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
    } else {
#pragma unroll
        for (int e = 0; e < kColumns; ++e) bits[e] = e < count ? from[e] : static_cast<uint16_t>(0);
    }
#pragma unroll
    for (int e = 0; e < kColumns; ++e)
        w[e] = args.dtype == Dtype::kFloat16 ? to_float<Half>(bits[e]) : to_float<BFloat>(bits[e]);
}

__device__ void store_codes(uint8_t* codes, int count, const uint32_t (&q)[kColumns]) {
    if (reinterpret_cast<uintptr_t>(codes) % 8 == 0 && count == kColumns) {
        *reinterpret_cast<uint2*>(codes) = {q[0] | q[1] << 8 | q[2] << 16 | q[3] << 24,
                                            q[4] | q[5] << 8 | q[6] << 16 | q[7] << 24};
        return;
    }
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
        if (e < count) codes[e] = static_cast<uint8_t>(q[e]);
    }
}

__device__ int columns_left(int64_t column, int64_t end) {
    const int64_t left = end - column;
    return left <= 0 ? 0 : left < kColumns ? static_cast<int>(left) : kColumns;
}

__global__ void __launch_bounds__(kThreads) rtn_kernel(const __grid_constant__ RtnCall call) {
    const RtnArgs& args = call.args;
    const GridRule rule(args);
    const int64_t groups = ceil_div(args.k, args.group_size);
    const int lane = static_cast<int>(threadIdx.x) % 32, in_group = lane % call.lanes;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
    const int64_t per_warp = 32 / call.lanes;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    // The whole warp stays together: lanes without a group work on none of their columns.
    for (int64_t first = warp * per_warp; first < args.n * groups; first += warps * per_warp) {
        const int64_t index = first + lane / call.lanes;
        const bool inside = index < args.n * groups;
        const int64_t row = inside ? index / groups : 0,
                      begin = inside ? index % groups * args.group_size : 0;
        const int64_t whole = begin + args.group_size;
        const int64_t end = !inside ? 0 : whole < args.k ? whole : args.k;
        float low = 0.0f, high = 0.0f, w[kColumns];
        for (int64_t c = begin + in_group * kColumns; c < end; c += call.lanes * kColumns) {
            load_columns(args, row * args.k + c, columns_left(c, end), w);
#pragma unroll
            for (int e = 0; e < kColumns; ++e) {
                low = w[e] < low ? w[e] : low;
                high = w[e] > high ? w[e] : high;
            }
        }
        for (int step = 1; step < call.lanes; step *= 2) {
            const float other_low = shuffle(low, lane ^ step), other_high = shuffle(high, lane ^ step);
            low = other_low < low ? other_low : low;
            high = other_high > high ? other_high : high;
        }
        float scale, zero;
        rule.find(low, high, &scale, &zero);
        if (inside && in_group == 0) {
            args.scale[index] = scale;
            args.zero[index] = static_cast<uint8_t>(zero);
        }
        for (int64_t c = begin + in_group * kColumns; c < end; c += call.lanes * kColumns) {
            const int count = columns_left(c, end);
            load_columns(args, row * args.k + c, count, w);
            uint32_t q[kColumns];
#pragma unroll
            for (int e = 0; e < kColumns; ++e)
                q[e] = static_cast<uint32_t>(static_cast<int>(encode(w[e], scale, zero, rule.max_code)));
            store_codes(args.codes + row * args.k + c, count, q);
        }
    }
}

int lanes_of(int64_t group_columns) {
    int lanes = 1;
    while (lanes < 32 && lanes * kColumns < group_columns) lanes *= 2;
    return lanes;
}

}  // namespace

void quantize_rtn(const RtnArgs& args, Target target) {
    if (args.n == 0 || args.k == 0) return;
    const int64_t groups = ceil_div(args.k, args.group_size),
                  length = args.group_size < args.k ? args.group_size : args.k;
    const RtnCall call{args, lanes_of(length)};
    const int64_t blocks = ceil_div(args.n * groups * call.lanes, kThreads);
    MMQ_TRACK(args.weight, args.n * args.k * (args.dtype == Dtype::kFloat32 ? 4 : 2), kInput);
    MMQ_TRACK(args.codes, args.n * args.k, kOutput);
    MMQ_TRACK(args.scale, args.n * groups * 4, kOutput);
    MMQ_TRACK(args.zero, args.n * groups, kOutput);
    launch("quantize_rtn", &rtn_kernel, dim3(static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20)),
           kThreads, 0, target, call);
}

}  // namespace mmq::cuda
