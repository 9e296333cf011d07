// y[m, n] = activation(x W^T + bias[n]), W[n, k] = scale[n, g] * (q[n, k] - zero[n, g]) packed in 2..8 bits.
//
//   x [m, k] fp16 or bf16, row major; W in the cuda layout (layout.cuh), any n, k, group size a multiple of 16;
//   y [m, n] in x's dtype. Products are exact, sums are fp32, scales are applied to the sums of a group in fp32.
//
// It is y^T = W x^T: weights are operand A of the tensor cores (16 rows), tokens their 8-wide side, so that 1 token
// costs what 8 do and a tile of tokens is any multiple of 8. Decoded weights live in registers only (gemm_tile.cuh).
//
// Work: the output tiles that fill whole waves are taken one a block; the units of k of those that remain are dealt out
// evenly (stream-K: Osama et al., arXiv 2301.03598). Blocks that share a tile leave partial sums in global memory, and
// the last of them adds up all, in the order of the blocks: the result is the same bits every time. No second kernel.
#pragma once

#include "../common/half.h"
#include "gemm_tile.cuh"

namespace mmq::cuda {
namespace {

#include "../common/activation.inl"

template <class T, int kBits, int kTokenTiles>
class Block : Tile<T, kBits, kTokenTiles> {
  public:
    __device__ __forceinline__ Block(const GemmArgs& args, const GemmPlan& plan, unsigned char* shared)
        : Product(args, plan, shared) {}

    __device__ __forceinline__ void run() {
        for (Work work = first_work(); work.begin < work.end; work = next_work(work)) {
            start_tile(work.tile);
            multiply(work.begin, work.end);
            if (work.end - work.begin == plan_.units || add_to_others(work.tile - plan_.whole_tiles)) store();
        }
    }

  private:
    using Product = Tile<T, kBits, kTokenTiles>;
    using Product::active_;
    using Product::args_;
    using Product::BLOCK_M;
    using Product::BLOCK_N;
    using Product::clear;
    using Product::each_fragment;
    using Product::first_token_;
    using Product::lane_;
    using Product::multiply;
    using Product::plan_;
    using Product::row_block_;
    using Product::shared_;
    using Product::start_tile;
    using Product::sum_;
    using Product::thread_;
    using Product::tokens_;
    using Product::warp_;

    // Units of k, of all remaining tiles one after another.
    struct Share {
        int64_t begin, end;
    };

    // Units [begin, end) of one output tile; none: nothing is left.
    struct Work {
        int tile, begin, end;
    };

    __device__ __forceinline__ Share share_of(int block) const {
        if (block >= plan_.sharers) return {0, 0};
        const int64_t units = static_cast<int64_t>(plan_.tiles - plan_.whole_tiles) * plan_.units;
        return {units * block / plan_.sharers, units * (block + 1) / plan_.sharers};
    }

    // What a share holds of the tile at `unit`.
    __device__ __forceinline__ Work shared_work(int64_t unit) const {
        const Share share = share_of(blockIdx.x);
        if (unit >= share.end) return {0, 0, 0};
        const int rest = static_cast<int>(unit / plan_.units);
        const int64_t first = static_cast<int64_t>(rest) * plan_.units;
        const int64_t stop = first + plan_.units < share.end ? first + plan_.units : share.end;
        return {plan_.whole_tiles + rest, static_cast<int>(unit - first), static_cast<int>(stop - first)};
    }

    __device__ __forceinline__ Work whole_work(int tile) const {
        if (tile < plan_.whole_tiles) return {tile, 0, plan_.units};
        return shared_work(share_of(blockIdx.x).begin);
    }

    __device__ __forceinline__ Work first_work() const { return whole_work(blockIdx.x); }

    __device__ __forceinline__ Work next_work(const Work& done) const {
        if (done.tile < plan_.whole_tiles) return whole_work(done.tile + plan_.blocks);
        return shared_work(static_cast<int64_t>(done.tile - plan_.whole_tiles) * plan_.units + done.end);
    }

    // --- sums of other blocks ---

    // Place of a fragment of this thread among the partial sums of a block.
    __device__ __forceinline__ int fragment_at(int j, int r) const {
        return ((j * kRowTiles + r) * kGemmThreads + thread_) * 4;
    }

    // Where a block leaves its part of remaining tile `rest`: of two places, the first if its share begins in it.
    __device__ __forceinline__ float* partials_of(int block, int rest) const {
        const bool begins = share_of(block).begin >= static_cast<int64_t>(rest) * plan_.units;
        return args_.partials + (2 * static_cast<int64_t>(block) + (begins ? 0 : 1)) * (BLOCK_M * BLOCK_N);
    }

    // The block whose share holds a unit.
    __device__ __forceinline__ int block_of(int64_t unit) const {
        const int64_t units = static_cast<int64_t>(plan_.tiles - plan_.whole_tiles) * plan_.units;
        return static_cast<int>(((unit + 1) * plan_.sharers - 1) / units);
    }

    // Leaves this block's part of a tile for the last block to come; true for that one, which then has the whole sum.
    __device__ __forceinline__ bool add_to_others(int rest) {
        const int64_t first_unit = static_cast<int64_t>(rest) * plan_.units;
        const int first = block_of(first_unit), last = block_of(first_unit + plan_.units - 1);
        float* mine = partials_of(blockIdx.x, rest);
        each_fragment([&](int j, int r, const float (&sum)[4]) {
            store_16(mine + fragment_at(j, r), bitcast<uint32_t>(sum[0]), bitcast<uint32_t>(sum[1]),
                     bitcast<uint32_t>(sum[2]), bitcast<uint32_t>(sum[3]));
        });
        __syncthreads();  // all of the block's part is written before it counts
        int* is_last = reinterpret_cast<int*>(shared_);
        if (thread_ == 0)
            *is_last = add_to_counter(args_.counters + rest, 1) == static_cast<uint32_t>(last - first);
        __syncthreads();
        const bool mine_to_store = *is_last != 0;
        __syncthreads();  // the flag's place is used again
        if (!mine_to_store) return false;
        if (thread_ == 0) args_.counters[rest] = 0;  // for the next launch
        clear(sum_);
        for (int block = first; block <= last; ++block) {
            const float* part = partials_of(block, rest);
            each_fragment([&](int j, int r, float (&sum)[4]) {
                uint32_t four[4];
                load_16(part + fragment_at(j, r), four);
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] += bitcast<float>(four[i]);
            });
        }
        return true;
    }

    // --- shared -> global ---

    // Sums go through shared memory, so that rows of y leave in 16-byte pieces, and bias and activation stand in the code
    // once.
    __device__ __forceinline__ void store() {
        constexpr int kPitch = BLOCK_N + 4;  // floats; the lanes of a warp write to all banks
        float* tile = reinterpret_cast<float*>(shared_);
        const int lane_row = warp_ * 16 * kRowTiles + lane_ / 4;
        each_fragment([&](int j, int r, const float (&sum)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = lane_row + 16 * r + i / 2 * 8, token = 8 * j + lane_ % 4 * 2 + i % 2;
                tile[token * kPitch + row] = sum[i];
            }
        });
        __syncthreads();
        const int64_t first_row = static_cast<int64_t>(row_block_) * BLOCK_N;
        for (int i = thread_; i < 8 * active_ * (BLOCK_N / 8); i += kGemmThreads) {
            const int token = i / (BLOCK_N / 8), column = i % (BLOCK_N / 8) * 8;
            const int64_t row = first_row + column;
            if (token >= tokens_ || row >= args_.weight.n) continue;
            const int count = args_.weight.n - row < 8 ? static_cast<int>(args_.weight.n - row) : 8;
            float* values = tile + token * kPitch + column;
#pragma unroll 1
            for (int e = 0; e < count; ++e)
                values[e] = activated(values[e] + bias(row + e), args_.activation);
            store_row(values, count, static_cast<int64_t>(first_token_ + token) * args_.weight.n + row);
        }
        __syncthreads();  // the next tile's stages come here
    }

    __device__ __forceinline__ void store_row(const float* values, int count, int64_t at) const {
        uint16_t* y = static_cast<uint16_t*>(args_.y) + at;
        if (plan_.aligned_rows) {
            uint32_t pairs[4];
#pragma unroll
            for (int p = 0; p < 4; ++p)
                pairs[p] = from_float<T>(values[2 * p]) |
                           static_cast<uint32_t>(from_float<T>(values[2 * p + 1])) << 16;
            store_16(y, pairs[0], pairs[1], pairs[2], pairs[3]);
        } else {
            for (int e = 0; e < count; ++e) y[e] = from_float<T>(values[e]);
        }
    }

    __device__ __forceinline__ float bias(int64_t row) const {
        return args_.bias == nullptr ? 0.0f : to_float<T>(static_cast<const uint16_t*>(args_.bias)[row]);
    }
};

template <class T, int kBits, int kTokenTiles>
__global__ void __launch_bounds__(kGemmThreads, blocks_per_multiprocessor(kTokenTiles))
    gemm_kernel(const __grid_constant__ GemmCall call) {
    MMQ_DYNAMIC_SHARED(shared);
    Block<T, kBits, kTokenTiles>(call.args, call.plan, shared).run();
}

}  // namespace
}  // namespace mmq::cuda
