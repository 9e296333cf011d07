// One output tile of a product: 256 rows of W and 8 * kTokenTiles tokens, over a range of k.
//
//   rows of W                             tokens: kTokenTiles x 8
//   +-------------- k --------------+    +-------------------+
//   | warp 0 | next unit |          |    |  x^T, by cp.async |    a warp multiplies 32 rows x 64 columns of a unit
//   | warp 1 |           |   ...    |  x |  through shared   |    with all tokens of the tile
//   |  ...   |           |          |    |  memory, swizzled |
//   | warp 7 |           |          |    +-------------------+
//   +--------+-----------+----------+
//
// A warp's weights pass through shared memory too, but each lane reads only what it copied itself: 16 bytes a load, no
// bank conflicts, and several stages in flight to cover the latency of memory.
//
// Idea of the layout and of weights as the stationary operand: Marlin (Frantar et al., arXiv 2408.11743).
#pragma once

#include "args.h"
#include "decode.cuh"
#include "gemm_plan.h"

namespace mmq::cuda {
namespace {

constexpr int kWarps = kGemmThreads / 32;
constexpr int kRowTiles = 2;  // 16-row tiles of a warp: half of a tile of the layout
constexpr int kHalves = 4 / kRowTiles;
static_assert(16 * kRowTiles * kWarps == kGemmRows, "gemm_plan.h counts on it");

template <class T, int kBits, int kTokenTiles>
class Tile {
  protected:
    static constexpr int BLOCK_M = 8 * kTokenTiles, BLOCK_N = kGemmRows, BLOCK_K = kTileSide;
    static constexpr int kChunks = BLOCK_K / 8;                 // 16-byte pieces of a token in a unit
    static constexpr int kWordBytes = 128 * kBits * kRowTiles;  // of a warp in a stage

    using Sums = float[kRowTiles][kTokenTiles][4];

    __device__ __forceinline__ Tile(const GemmArgs& args, const GemmPlan& plan, unsigned char* shared)
        : args_(args),
          plan_(plan),
          shared_(shared),
          thread_(static_cast<int>(threadIdx.x)),
          lane_(thread_ % 32),
          warp_(thread_ / 32) {}

    __device__ __forceinline__ void start_tile(int tile) {
        row_block_ = tile / plan_.token_blocks;
        first_token_ = tile % plan_.token_blocks * BLOCK_M;
        const int64_t left = args_.m - first_token_;
        tokens_ = left < BLOCK_M ? static_cast<int>(left) : BLOCK_M;
        active_ = (tokens_ + 7) / 8;
        clear(sum_);
    }

    __device__ __forceinline__ static void clear(Sums& sums) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[r][j][i] = 0.0f;
            }
        }
    }

    // --- global -> shared ---
    //
    // A stage: words of each warp, x, scales of each warp, zero points of each warp. What addresses depend on within a
    // tile is worked out once, at its start: a unit of few tokens is over in a few hundred instructions.

    __device__ __forceinline__ int row_tile() const { return (row_block_ * kWarps + warp_) / kHalves; }
    // Which half of its tile of 64 rows the warp takes.
    __device__ __forceinline__ int half() const { return warp_ % kHalves; }

    __device__ __forceinline__ unsigned char* words_of(unsigned char* stage) const {
        return stage + warp_ * kWordBytes;
    }
    __device__ __forceinline__ unsigned char* tokens_of(unsigned char* stage) const {
        return stage + kWarps * kWordBytes;
    }
    __device__ __forceinline__ unsigned char* scales_of(unsigned char* stage) const {
        return stage + plan_.scales_at + warp_ * plan_.warp_scale_bytes;
    }
    __device__ __forceinline__ unsigned char* zeros_of(unsigned char* stage) const {
        return stage + plan_.zeros_at + warp_ * plan_.warp_zero_bytes;
    }

    // Where this thread's copies for the next unit come from.
    struct Sources {
        const uint32_t* words;  // its lane's first vector
        const char* scale;      // its lane's part of the scales of group 0, for the warp's tile
        const char* zero;
        const uint16_t* tokens;  // its first 8 columns of a token
    };

    __device__ __forceinline__ Sources sources_at(int unit) const {
        const int64_t tile = static_cast<int64_t>(row_tile()) * plan_.k_tiles + unit;
        const int64_t token = first_token_ + thread_ / kChunks;
        return {args_.weight.tiles + tile * kBits * 128 + lane_ * 4,
                static_cast<const char*>(args_.weight.scale) +
                    static_cast<int64_t>(row_tile()) * kTileSide * plan_.scale_bytes + lane_ * 16,
                reinterpret_cast<const char*>(args_.weight.zero) +
                    static_cast<int64_t>(row_tile()) * 8 * kBits + lane_ * 8,
                static_cast<const uint16_t*>(args_.x) + token * args_.weight.k + unit * BLOCK_K +
                    thread_ % kChunks * 8};
    }

    __device__ __forceinline__ void load_stage(int unit, unsigned char* stage, Sources& sources) {
        if (row_tile() < plan_.row_tiles) {
            load_plane<0>(words_of(stage), sources.words);
            load_plane<1>(words_of(stage), sources.words);
            load_plane<2>(words_of(stage), sources.words);
            load_grids(unit, stage, sources);
        }
        if (plan_.direct) {
            load_tokens(unit, stage, sources.tokens);
        } else {
            gather_tokens(unit, stage);
        }
        sources.words += kBits * 128;
        sources.tokens += BLOCK_K;
    }

    template <int kPlane>
    __device__ __forceinline__ void load_plane(unsigned char* to, const uint32_t* from) {
        if constexpr (kPlane < planes_of(kBits).count) {
            constexpr int width = planes_of(kBits).width[kPlane], low = planes_of(kBits).low[kPlane];
            if constexpr (width == 1) {  // half a vector
                copy_8(to + low * 128 * kRowTiles + lane_ * 8, from + low * 128 + half() * 2);
            } else {
                constexpr int vectors = width * kRowTiles / 4;
                unsigned char* there = to + low * 128 * kRowTiles + lane_ * 16;
                const uint32_t* here = from + (low + half() * vectors) * 128;
#pragma unroll
                for (int v = 0; v < vectors; ++v) {
                    if (plan_.token_blocks == 1) {
                        copy_16_once(there + v * 512, here + v * 128);
                    } else {
                        copy_16(there + v * 512, here + v * 128, true);  // other blocks will want it too
                    }
                }
            }
        }
    }

    // Group of a column: a multiplication instead of a division.
    __device__ __forceinline__ int group_of(int column) const {
        return static_cast<int>(static_cast<uint64_t>(column / kMmaColumns) * plan_.group_magic >> 32);
    }

    __device__ __forceinline__ int last_group_of(int column) const {
        const int end = column + kTileSide, k = static_cast<int>(args_.weight.k);
        return group_of((end < k ? end : k) - 1);
    }

    __device__ __forceinline__ void load_grids(int unit, unsigned char* stage, const Sources& sources) {
        const int column = unit * kTileSide, first = group_of(column);
        const int last = plan_.groups_per_tile == 1 ? first : last_group_of(column);
        const char* scale =
            sources.scale + static_cast<uint64_t>(static_cast<uint32_t>(first)) * plan_.scale_row_bytes;
        const char* zero =
            sources.zero + static_cast<uint64_t>(static_cast<uint32_t>(first)) * plan_.zero_row_bytes;
        unsigned char* scales = scales_of(stage) + lane_ * 16;
        unsigned char* zeros = zeros_of(stage) + lane_ * 8;
#pragma unroll 1
        for (int group = first; group <= last; ++group) {
            if (lane_ < 4 * plan_.scale_bytes) copy_16(scales, scale, true);  // 64 scales
            if (lane_ < kBits && args_.weight.zero != nullptr) copy_8(zeros, zero);
            scales += kTileSide * plan_.scale_bytes;
            zeros += 8 * kBits;
            scale += plan_.scale_row_bytes;
            zero += plan_.zero_row_bytes;
        }
    }

    // Where 8 columns of a token stand: chunks of 16 bytes, swizzled so that 8 tokens of a chunk hit all banks.
    __device__ __forceinline__ static int chunk_at(int token, int chunk) {
        return (token * kChunks + (chunk ^ (token & 7))) * 16;
    }

    __device__ __forceinline__ void load_tokens(int unit, unsigned char* stage, const uint16_t* from) {
        constexpr int kStep = kGemmThreads / kChunks;  // tokens from one of a thread's copies to the next
        static_assert(kStep % 8 == 0, "the swizzle of a thread's copies is the same");
        const int chunk = thread_ % kChunks, token = thread_ / kChunks;
        const bool column_inside = unit * BLOCK_K + chunk * 8 < static_cast<int>(args_.weight.k);
        unsigned char* to = tokens_of(stage) + chunk_at(token, chunk);
#pragma unroll
        for (int i = 0; i < BLOCK_M; i += kStep) {
            if (token + i >= 8 * active_) break;
            copy_16(to + i * kChunks * 16, from + i * args_.weight.k, column_inside && token + i < tokens_);
        }
    }

    // The same where columns are permuted or scaled, or rows are not aligned: one value at a time.
    __device__ __forceinline__ void gather_tokens(int unit, unsigned char* stage) {
#pragma unroll 1
        for (int i = thread_; i < 8 * active_ * kChunks; i += kGemmThreads) {
            const int token = i / kChunks, column = unit * BLOCK_K + i % kChunks * 8;
            uint32_t pairs[4] = {};
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (token < tokens_ && column + e < args_.weight.k)
                    pairs[e / 2] |= static_cast<uint32_t>(input(first_token_ + token, column + e))
                                    << (16 * (e % 2));
            }
            const uint4 all = {pairs[0], pairs[1], pairs[2], pairs[3]};
            *reinterpret_cast<uint4*>(tokens_of(stage) + chunk_at(token, i % kChunks)) = all;
        }
    }

    __device__ __forceinline__ uint16_t input(int64_t token, int64_t column) const {
        const int64_t source = args_.perm ? args_.perm[column] : column;
        const uint16_t x = static_cast<const uint16_t*>(args_.x)[token * args_.weight.k + source];
        if (args_.input_scale == nullptr) return x;
        return from_float<T>(to_float<T>(x) /
                             to_float<T>(static_cast<const uint16_t*>(args_.input_scale)[source]));
    }

    // --- multiplication ---

    // gemm_plan.cpp takes 2, 3, 4 or 6 stages.
    __device__ __forceinline__ void wait_for_stages(int left) {
        if (left >= 4) {
            wait_copies<4>();
        } else if (left == 2) {
            wait_copies<2>();
        } else if (left == 1) {
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
    }

    // Adds the units [begin, end) of k to the sums.
    __device__ __forceinline__ void multiply(int begin, int end) {
        const int ahead = plan_.stages - 1;
        unsigned char *stage = shared_, *fill = shared_;
        unsigned char* const behind = shared_ + plan_.stages * plan_.stage_bytes;
        Sources sources = sources_at(begin);
        for (int unit = begin - ahead; unit < end; ++unit) {  // the first `ahead` turns only fill stages
            if (unit >= begin) {
                wait_for_stages(ahead - 1);
                __syncthreads();  // the stage has landed for all, and all are done with the one filled next
            }
            if (unit + ahead < end) load_stage(unit + ahead, fill, sources);
            commit_copies();
            fill = fill + plan_.stage_bytes == behind ? shared_ : fill + plan_.stage_bytes;
            if (unit < begin) continue;
            if (row_tile() < plan_.row_tiles) {
                if (plan_.groups_per_tile == 1) {
                    multiply_stage<false>(unit, stage);
                } else {
                    multiply_stage<true>(unit, stage);
                }
            }
            stage = stage + plan_.stage_bytes == behind ? shared_ : stage + plan_.stage_bytes;
        }
        wait_copies<0>();
        __syncthreads();  // what follows uses the stages for other things
    }

    // Words of steps 0 and 1 (kHalf 0) or 2 and 3. Only a plane of width 8 has them in vectors of their own; others are
    // read whole the first time.
    template <int kPlane, int kHalf>
    __device__ __forceinline__ void read_plane(const unsigned char* from,
                                               uint32_t (&words)[kRowTiles][kBits]) const {
        if constexpr (kPlane < planes_of(kBits).count) {
            constexpr int width = planes_of(kBits).width[kPlane], low = planes_of(kBits).low[kPlane];
            const unsigned char* plane = from + low * 128 * kRowTiles;
            if constexpr (kHalf == 1 && width < 8) {
                return;
            } else if constexpr (width == 1) {
                const uint2 both = *reinterpret_cast<const uint2*>(plane + lane_ * 8);
                words[0][low] = both.x;
                words[1][low] = both.y;
            } else {
#pragma unroll
                for (int v = 0; v < width * kRowTiles / 4; ++v) {
                    if (width == 8 && v % 2 != kHalf) continue;
                    const uint4 four = *reinterpret_cast<const uint4*>(plane + (v * 32 + lane_) * 16);
                    const uint32_t flat[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int q = 0; q < 4; ++q)
                        words[(4 * v + q) / width][low + (4 * v + q) % width] = flat[q];
                }
            }
        }
    }

    // Zero points of a lane's rows, as the decoder wants them.
    __device__ __forceinline__ void read_zeros(const unsigned char* stage, int slot,
                                               uint32_t (&zeros)[2 * kRowTiles]) const {
        if (args_.weight.zero == nullptr) {
#pragma unroll
            for (int i = 0; i < 2 * kRowTiles; ++i) zeros[i] = Decoder<T, kBits>::operand(1u << (kBits - 1));
            return;
        }
        const uint32_t* words =
            reinterpret_cast<const uint32_t*>(stage + plan_.zeros_at + warp_ * plan_.warp_zero_bytes) +
            slot * 2 * kBits;
        const int bit = ((lane_ / 4) * 8 + half() * 2 * kRowTiles) * kBits, word = bit / 32;
        const int last = 2 * kBits - 1;
        const uint32_t first = words[word], second = words[word < last ? word + 1 : last];
        const uint32_t third = words[word + 1 < last ? word + 2 : last];
        const uint32_t window[2] = {funnel_right(first, second, bit % 32),
                                    funnel_right(second, third, bit % 32)};
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int at = i * kBits;
            const uint32_t low = window[at / 32], high = window[at / 32 + 1 < 2 ? at / 32 + 1 : 1];
            zeros[i] = Decoder<T, kBits>::operand(funnel_right(low, high, at % 32) & ((1u << kBits) - 1));
        }
    }

    __device__ __forceinline__ void read_scales(const unsigned char* stage, int slot,
                                                float (&scales)[2 * kRowTiles]) const {
        const unsigned char* from =
            stage + plan_.scales_at + warp_ * plan_.warp_scale_bytes + slot * kTileSide * plan_.scale_bytes;
        const int first = (lane_ / 4) * 8 + half() * 2 * kRowTiles;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; i += 4) {
            if (plan_.scale_bytes == 4) {
                const float4 four = *reinterpret_cast<const float4*>(from + (first + i) * 4);
                const float flat[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int q = 0; q < 4; ++q) scales[i + q] = flat[q];
                continue;
            }
            const uint2 two = *reinterpret_cast<const uint2*>(from + (first + i) * 2);
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const uint16_t bits = static_cast<uint16_t>((q < 2 ? two.x : two.y) >> (16 * (q % 2)));
                const bool half = args_.weight.scale_dtype == Dtype::kFloat16;
                scales[i + q] = half ? to_float<Half>(bits) : to_float<BFloat>(bits);
            }
        }
    }

    // Whether another group begins at a step of the tile at `column`.
    template <int kStep>
    __device__ __forceinline__ bool begins_group(int column) const {
        const int first = column + kStep * kMmaColumns;
        return kStep > 0 && first < args_.weight.k && group_of(first) != group_of(first - 1);
    }

    template <int kStep, bool kManyGroups>
    __device__ __forceinline__ void decode_step(int column, const unsigned char* stage, int& slot,
                                                const uint32_t (&words)[kRowTiles][kBits],
                                                uint32_t (&zeros)[2 * kRowTiles],
                                                uint32_t (&a)[kRowTiles][4]) const {
        if (kManyGroups && begins_group<kStep>(column)) read_zeros(stage, ++slot, zeros);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
            Decoder<T, kBits>::template fragment<kStep>(words[r], zeros[2 * r], zeros[2 * r + 1], a[r]);
    }

    // part += a step of token tile j; where a group begins, what came before is closed first.
    template <int kStep, bool kManyGroups>
    __device__ __forceinline__ void multiply_step(int column, const unsigned char* stage, int j, int& slot,
                                                  const uint32_t (&a)[kRowTiles][4], uint32_t b0, uint32_t b1,
                                                  float (&part)[kRowTiles][4],
                                                  float (&scales)[2 * kRowTiles]) {
        if (kManyGroups && begins_group<kStep>(column)) {
            close_group(part, scales, j);
            read_scales(stage, ++slot, scales);
        }
        const uint32_t b[2] = {b0, b1};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) multiply_add<T>(part[r], a[r], b);
    }

    // sum += scale * part, for what was added up in one group.
    __device__ __forceinline__ void close_group(float (&part)[kRowTiles][4],
                                                const float (&scales)[2 * kRowTiles], int j) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum_[r][j][i] = fmaf(scales[2 * r + i / 2], part[r][i], sum_[r][j][i]);
                part[r][i] = 0.0f;
            }
        }
    }

    // A unit of this warp: its weights become operands once, and meet one tile of tokens after another.
    template <bool kManyGroups>
    __device__ __forceinline__ void multiply_stage(int unit, unsigned char* stage) {
        const int column = unit * kTileSide;
        uint32_t a[kStepsPerTile][kRowTiles][4];
        {
            uint32_t words[kRowTiles][kBits], zeros[2 * kRowTiles];
            read_plane<0, 0>(words_of(stage), words);
            read_plane<1, 0>(words_of(stage), words);
            read_plane<2, 0>(words_of(stage), words);
            int slot = 0;
            read_zeros(stage, slot, zeros);
            decode_step<0, kManyGroups>(column, stage, slot, words, zeros, a[0]);
            decode_step<1, kManyGroups>(column, stage, slot, words, zeros, a[1]);
            read_plane<0, 1>(words_of(stage), words);
            decode_step<2, kManyGroups>(column, stage, slot, words, zeros, a[2]);
            decode_step<3, kManyGroups>(column, stage, slot, words, zeros, a[3]);
        }
        float scales[2 * kRowTiles];
        read_scales(stage, 0, scales);
        // Lane l hands ldmatrix the row l % 8 of matrix l / 8: of columns 0..31, then of 32..63.
        const unsigned char* first_columns = tokens_of(stage) + chunk_at(lane_ % 8, lane_ / 8);
        const unsigned char* last_columns = tokens_of(stage) + chunk_at(lane_ % 8, lane_ / 8 + 4);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
            if (j > 0 && j >= active_) break;
            uint32_t b[2][4];  // of two steps each
            load_matrices(b[0], first_columns + j * 8 * kChunks * 16);
            load_matrices(b[1], last_columns + j * 8 * kChunks * 16);
            float part[kRowTiles][4] = {};
            int slot = 0;
            multiply_step<0, kManyGroups>(column, stage, j, slot, a[0], b[0][0], b[0][1], part, scales);
            multiply_step<1, kManyGroups>(column, stage, j, slot, a[1], b[0][2], b[0][3], part, scales);
            multiply_step<2, kManyGroups>(column, stage, j, slot, a[2], b[1][0], b[1][1], part, scales);
            multiply_step<3, kManyGroups>(column, stage, j, slot, a[3], b[1][2], b[1][3], part, scales);
            close_group(part, scales, j);
            if (kManyGroups && slot > 0) read_scales(stage, 0, scales);
        }
    }

    // `function` on the four sums of each fragment, of which there are kRowTiles for a token tile.
    template <class Function>
    __device__ __forceinline__ void each_fragment(const Function& function) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
            if (j > 0 && j >= active_) break;
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) function(j, r, sum_[r][j]);
        }
    }

    const GemmArgs& args_;
    const GemmPlan& plan_;
    unsigned char* const shared_;
    const int thread_, lane_, warp_;
    int row_block_ = 0, first_token_ = 0, tokens_ = 0, active_ = 0;
    Sums sum_;  // scaled, of all groups closed so far
};

}  // namespace
}  // namespace mmq::cuda
