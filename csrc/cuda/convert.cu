// Codes <-> dense streams <-> the cuda layout, and packed weights -> dense ones: what moves bytes.
//
//   pack, unpack          a thread takes 32 codes of a row, which are exactly `bits` words
//   prepack, unprepack    a block takes a tile of 64 x 64 codes: of a stream 2*bits whole words a row
//   dequantize            a block takes a tile, decodes it as gemm does, and leaves rows of the output in 16-byte pieces
#include "decode.cuh"
#include "kernels.h"
#include "runtime.cuh"
#include "weight.cuh"

namespace mmq::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kCodesPerThread = 32;

__device__ uint32_t field_mask(int width) {
    return (1u << width) - 1u;
}

// --- codes <-> streams ---

// The 32 codes of a thread: their row, first column and how many there are.
struct Piece {
    int64_t row, column;
    int count;
};

__device__ Piece piece_of(const PackArgs& args, int64_t index) {
    const int64_t per_row = ceil_div(args.k, kCodesPerThread);
    const int64_t column = index % per_row * kCodesPerThread, left = args.k - column;
    return {index / per_row, column, static_cast<int>(left < kCodesPerThread ? left : kCodesPerThread)};
}

__device__ int64_t pieces(const PackArgs& args) {
    return args.n * ceil_div(args.k, kCodesPerThread);
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackArgs args) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < pieces(args); i += step) {
        const Piece piece = piece_of(args, i);
        const uint8_t* codes = args.codes + piece.row * args.k + piece.column;
        uint32_t* words =
            args.words + piece.row * stream_words(args.k, args.bits) + piece.column * args.bits / 32;
        uint64_t window = 0;
        int filled = 0;
        for (int c = 0; c < piece.count; ++c) {
            window |= static_cast<uint64_t>(codes[c]) << filled;
            filled += args.bits;
            if (filled < 32) continue;
            *words++ = static_cast<uint32_t>(window);
            window >>= 32;
            filled -= 32;
        }
        if (filled > 0) *words = static_cast<uint32_t>(window);
    }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ PackArgs args) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < pieces(args); i += step) {
        const Piece piece = piece_of(args, i);
        uint8_t* codes = args.codes + piece.row * args.k + piece.column;
        const uint32_t* words =
            args.words + piece.row * stream_words(args.k, args.bits) + piece.column * args.bits / 32;
        uint64_t window = 0;
        int filled = 0;
        for (int c = 0; c < piece.count; ++c) {
            if (filled < args.bits) {
                window |= static_cast<uint64_t>(*words++) << filled;
                filled += 32;
            }
            codes[c] = static_cast<uint8_t>(window & field_mask(args.bits));
            window >>= args.bits;
            filled -= args.bits;
        }
    }
}

// --- streams <-> tiles ---

struct TilePlace {
    int row_tile, k_tile;
};

__device__ TilePlace tile_place(int64_t k) {
    const int k_tiles = static_cast<int>(tile_count(k)), tile = static_cast<int>(blockIdx.x);
    return {tile / k_tiles, tile % k_tiles};
}

// Bits [bit, bit + width) of a stream; they may straddle two words.
__device__ uint32_t bits_at(const uint32_t* words, int bit, int width) {
    const uint32_t low = words[bit / 32] >> (bit % 32);
    const uint32_t high = bit % 32 + width > 32 ? words[bit / 32 + 1] << (32 - bit % 32) : 0u;
    return (low | high) & field_mask(width);
}

// A word of the streams of a tile's rows, where there is one.
__device__ bool stream_word_of(const PrepackArgs& args, TilePlace place, int i, int64_t* index) {
    const int64_t row = static_cast<int64_t>(place.row_tile) * kTileSide + i / (2 * args.bits);
    const int64_t word = static_cast<int64_t>(place.k_tile) * 2 * args.bits + i % (2 * args.bits);
    const int64_t words = stream_words(args.k, args.bits);
    *index = row * words + word;
    return row < args.n && word < words;
}

// The word at place `index` (in words) of a tile, composed of the streams of the tile's rows.
template <int bits>
__device__ uint32_t compose_word(int index, const uint32_t* streams) {
    constexpr Planes planes = planes_of(bits);
    const int vector = index / 128, lane = index % 128 / 4;
    int width = planes.width[0], low = 0;
#pragma unroll
    for (int p = 1; p < planes.count; ++p) {
        if (vector >= planes.low[p]) width = planes.width[p], low = planes.low[p];
    }
    const int flat = 4 * (vector - low) + index % 4;
    uint32_t word = 0;
    for (int in_word = 0; in_word < 16 / width; ++in_word) {
        const int pair = flat % width * (16 / width) + in_word;
        const int position = pair_position(bits, width, low, pair);
        const int row = 16 * (flat / width) + 8 * (pair & 1) + lane / 4;
        const int column = kMmaColumns * (pair / 4) + 8 * (pair >> 1 & 1) + 2 * (lane % 4);
        for (int half = 0; half < 2; ++half) {
            const uint32_t code = bits_at(streams + row * 2 * bits, (column + half) * bits, bits);
            word |= (code >> low & field_mask(width)) << ((position + 16 * half) % 32);
        }
    }
    return word;
}

template <int kBits>
__global__ void __launch_bounds__(kThreads) prepack_kernel(const __grid_constant__ PrepackArgs args) {
    MMQ_DYNAMIC_SHARED(shared);
    uint32_t* streams = reinterpret_cast<uint32_t*>(shared);
    const TilePlace place = tile_place(args.k);
    const int words = kTileSide * 2 * kBits;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
        int64_t index;
        streams[i] = stream_word_of(args, place, i, &index) ? args.words[index] : 0u;
    }
    __syncthreads();
    uint32_t* tile = args.tiles + static_cast<int64_t>(blockIdx.x) * words;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads)
        tile[i] = compose_word<kBits>(i, streams);
}

// The code at a row and column of a tile.
template <int bits>
__device__ uint32_t code_at(int row, int column, const uint32_t* tile) {
    const CodePlace place = place_of(row, column);
    constexpr Planes planes = planes_of(bits);
    uint32_t code = 0;
#pragma unroll
    for (int p = 0; p < planes.count; ++p) {
        const int width = planes.width[p], low = planes.low[p];
        const int flat = place.row_tile * width + pair_word(width, place.pair);
        const uint32_t word = tile[(low + flat / 4) * 128 + place.lane * 4 + flat % 4];
        const int position = (pair_position(bits, width, low, place.pair) + 16 * place.half) % 32;
        // A field may wrap around the end of the word.
        code |= (funnel_right(word, word, static_cast<uint32_t>(position)) & field_mask(width)) << low;
    }
    return code;
}

template <int kBits>
__global__ void __launch_bounds__(kThreads) unprepack_kernel(const __grid_constant__ PrepackArgs args) {
    MMQ_DYNAMIC_SHARED(shared);
    uint32_t* tile = reinterpret_cast<uint32_t*>(shared);
    const TilePlace place = tile_place(args.k);
    const int words = kTileSide * 2 * kBits;
    const uint32_t* from = args.tiles + static_cast<int64_t>(blockIdx.x) * words;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) tile[i] = from[i];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
        int64_t index;
        if (!stream_word_of(args, place, i, &index)) continue;
        const int row = i / (2 * kBits), first_bit = i % (2 * kBits) * 32;
        uint32_t word = 0;
        for (int column = first_bit / kBits; column * kBits < first_bit + 32 && column < kTileSide;
             ++column) {
            const uint64_t code = code_at<kBits>(row, column, tile);
            const int at = column * kBits - first_bit;
            word |= static_cast<uint32_t>(at >= 0 ? code << at : code >> -at);
        }
        args.words[index] = word;
    }
}

// --- dequantize ---

constexpr int kPitch = kTileSide + 4;  // floats of a row in shared memory

__device__ float load_scale(const Weight& weight, int64_t i) {
    if (weight.scale_dtype == Dtype::kFloat32) return static_cast<const float*>(weight.scale)[i];
    const uint16_t bits = static_cast<const uint16_t*>(weight.scale)[i];
    return weight.scale_dtype == Dtype::kFloat16 ? to_float<Half>(bits) : to_float<BFloat>(bits);
}

// scale * (values + offset) for 8 columns of a row, of which `count` are there.
__device__ void store_values(const DequantizeArgs& args, int64_t i, int count, float scale, float offset,
                             const float* values) {
    if (args.dtype == Dtype::kFloat32) {
        float* out = static_cast<float*>(args.out) + i;
        for (int e = 0; e < count; ++e) out[e] = scale * (values[e] + offset);
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(args.out) + i;
    uint32_t pairs[4] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const float value = scale * (values[e] + offset);
        const uint32_t bits =
            args.dtype == Dtype::kFloat16 ? from_float<Half>(value) : from_float<BFloat>(value);
        pairs[e / 2] |= bits << (16 * (e % 2));
    }
    if (reinterpret_cast<uintptr_t>(out) % 16 == 0 && count == 8) {
        store_16(out, pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            if (e < count) out[e] = static_cast<uint16_t>(pairs[e / 2] >> (16 * (e % 2)));
        }
    }
}

// Integers q - 2^(bits-1) of a lane's codes of one row tile -> rows of shared memory.
template <int kBits, int kStep>
__device__ void spread_step(const uint32_t (&words)[kBits], int row_tile, int lane, float* values) {
    using Decode = Decoder<Half, kBits>;
    const uint32_t middle = Decode::operand(1u << (kBits - 1));
    uint32_t a[4];
    Decode::template fragment<kStep>(words, middle, middle, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 16 * row_tile + lane / 4 + 8 * (i & 1),
                  column = 16 * kStep + 2 * (lane % 4) + 8 * (i >> 1);
        values[row * kPitch + column] = to_float<Half>(static_cast<uint16_t>(a[i]));
        values[row * kPitch + column + 1] = to_float<Half>(static_cast<uint16_t>(a[i] >> 16));
    }
}

template <int kBits>
__global__ void __launch_bounds__(128) dequantize_kernel(const __grid_constant__ DequantizeArgs args) {
    MMQ_DYNAMIC_SHARED(shared);
    float* values = reinterpret_cast<float*>(shared);
    const Weight& weight = args.weight;
    const TilePlace place = tile_place(weight.k);
    const int lane = static_cast<int>(threadIdx.x) % 32, row_tile = static_cast<int>(threadIdx.x) / 32;
    const uint32_t* tile = weight.tiles + static_cast<int64_t>(blockIdx.x) * kBits * 128;
    constexpr Planes planes = planes_of(kBits);
    uint32_t words[kBits];
#pragma unroll
    for (int p = 0; p < planes.count; ++p) {
#pragma unroll
        for (int w = 0; w < planes.width[p]; ++w) {
            const int flat = row_tile * planes.width[p] + w;
            words[planes.low[p] + w] = tile[(planes.low[p] + flat / 4) * 128 + lane * 4 + flat % 4];
        }
    }
    spread_step<kBits, 0>(words, row_tile, lane, values);
    spread_step<kBits, 1>(words, row_tile, lane, values);
    spread_step<kBits, 2>(words, row_tile, lane, values);
    spread_step<kBits, 3>(words, row_tile, lane, values);
    __syncthreads();
    const int64_t row_tiles = tile_count(weight.n);
    for (int i = static_cast<int>(threadIdx.x); i < kTileSide * 8; i += 128) {
        const int in_row = i / 8, in_column = i % 8 * 8;  // 8 columns share a group
        const int64_t row = static_cast<int64_t>(place.row_tile) * kTileSide + in_row;
        const int64_t column = static_cast<int64_t>(place.k_tile) * kTileSide + in_column;
        if (row >= weight.n || column >= weight.k) continue;
        const int64_t grid = column / weight.group_size * row_tiles + place.row_tile;
        const int position = scale_position(in_row);
        float offset = 0.0f;
        if (weight.zero != nullptr) {
            const uint32_t zero = bits_at(weight.zero + grid * 2 * kBits, position * kBits, kBits);
            offset = static_cast<float>(1 << (kBits - 1)) - static_cast<float>(zero);
        }
        const int count = weight.k - column < 8 ? static_cast<int>(weight.k - column) : 8;
        store_values(args, row * weight.k + column, count, load_scale(weight, grid * kTileSide + position),
                     offset, values + in_row * kPitch + in_column);
    }
}

unsigned blocks_for(int64_t threads) {
    const int64_t blocks = ceil_div(threads, kThreads);
    return static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20);
}

unsigned tiles_of_weight(int64_t n, int64_t k) {
    return static_cast<unsigned>(tile_count(n) * tile_count(k));
}

}  // namespace

void pack(const PackArgs& args, Target target) {
    if (args.n == 0 || args.k == 0) return;
    MMQ_TRACK(args.codes, args.n * args.k, kInput);
    MMQ_TRACK(args.words, args.n * stream_words(args.k, args.bits) * 4, kOutput);
    launch("pack", &pack_kernel, dim3(blocks_for(args.n * ceil_div(args.k, kCodesPerThread))), kThreads, 0,
           target, args);
}

void unpack(const PackArgs& args, Target target) {
    if (args.n == 0 || args.k == 0) return;
    MMQ_TRACK(args.words, args.n * stream_words(args.k, args.bits) * 4, kInput);
    MMQ_TRACK(args.codes, args.n * args.k, kOutput);
    launch("unpack", &unpack_kernel, dim3(blocks_for(args.n * ceil_div(args.k, kCodesPerThread))), kThreads,
           0, target, args);
}

void prepack(const PrepackArgs& args, Target target) {
    if (args.n == 0 || args.k == 0) return;
    MMQ_TRACK(args.words, args.n * stream_words(args.k, args.bits) * 4, kInput);
    MMQ_TRACK(args.tiles, tile_count(args.n) * tile_count(args.k) * args.bits * 512, kOutput);
    with_bits(args.bits, [&](auto bits) {
        launch("prepack", &prepack_kernel<bits>, dim3(tiles_of_weight(args.n, args.k)), kThreads,
               kTileSide * 8 * bits, target, args);
    });
}

void unprepack(const PrepackArgs& args, Target target) {
    if (args.n == 0 || args.k == 0) return;
    MMQ_TRACK(args.tiles, tile_count(args.n) * tile_count(args.k) * args.bits * 512, kInput);
    MMQ_TRACK(args.words, args.n * stream_words(args.k, args.bits) * 4, kOutput);
    with_bits(args.bits, [&](auto bits) {
        launch("unprepack", &unprepack_kernel<bits>, dim3(tiles_of_weight(args.n, args.k)), kThreads,
               kTileSide * 8 * bits, target, args);
    });
}

void dequantize(const DequantizeArgs& args, Target target) {
    const Weight& weight = args.weight;
    if (weight.n == 0 || weight.k == 0) return;
    track_weight(weight);
    MMQ_TRACK(args.out, weight.n * weight.k * (args.dtype == Dtype::kFloat32 ? 4 : 2), kOutput);
    with_bits(weight.bits, [&](auto bits) {
        launch("dequantize", &dequantize_kernel<bits>, dim3(tiles_of_weight(weight.n, weight.k)), 128,
               kTileSide * kPitch * static_cast<int>(sizeof(float)), target, args);
    });
}

}  // namespace mmq::cuda
