// y[m, n] = activation(x[m, k] W[n, k]^T + bias[n])
// W = scale * (q - zero), in the cpu layout (common/layout.h)
//
// x, bias, y: fp32, fp16 or bf16, contiguous; accumulation in fp32. Any m, n, k. Included inside an anonymous
// namespace after decode.inl. A thread owns whole tiles of 16 rows of W: results do not depend on how many.
//
// Few tokens (m <= 8), `multiply_tile`: one pass over the words, codes go from a register into the FMA:
//
//     acc[t] = sum over a segment of x[t][k] * (q[k] - c)     c = 2^(bits-1): little cancels
//     y[t]  += scale * (acc[t] - (zero - c) * sum of x[t])    segment: at most 256 columns of one group
//
// Many tokens, `multiply_strip`: a panel of 16 rows x 256 columns is decoded to fp32 (16 KB, level 1) and
// multiplied with all tokens of a block, kTokens at a time; x was transposed once, so that it streams:
//
//             tokens of a block ->                         one panel x one group of tokens:
//      W    +------+------+------+                           for k: acc[t] += panel[k] * x[k][t]
//    4 tiles| acc  |      |      |  level 2                  accumulators stay in registers
//           +------+------+------+

constexpr int kFewTokens = 8;
constexpr int64_t kPanelColumns = 256;
constexpr int kStripTiles = 4;
constexpr int64_t kBlockTokens = 264;  // a multiple of every kTokens; accumulators of a strip take 66 KB

static_assert(kPanelColumns % kGrainColumns == 0, "a panel is made of whole grains");
static_assert(kBlockTokens % kTokens == 0, "only the last group of tokens of a block is short");

// --- few tokens ---

// x in fp32 [TOKENS, columns] with columns padded to whole grains, and its sums [segments, TOKENS].
struct FewTokens {
    int64_t columns;
    const float* x;
    const float* sums;
};

template <int BITS, int TOKENS>
void multiply_tile(const GemmArgs& args, const FewTokens& in, int64_t tile_index) {
    // FMA takes 4 cycles: with fewer tokens, columns take turns between accumulators.
    constexpr int kChains = TOKENS >= 4 ? 1 : TOKENS >= 2 ? 2 : 4;
    const Weight& w = args.weight;
    const Tile<BITS> tile(w, tile_index);
    F16 y[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) y[t] = set1(0.0f);
    const float* sums = in.sums;
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) {
        const Grid grid = load_grid<BITS>(w, tile_index, group);
        F16 acc[kChains][TOKENS];
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) {
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) acc[i][t] = set1(0.0f);
        }
        for (int64_t column = begin; column < end; column += kGrainColumns) {
            if (column % kUnitColumns == 0)
                fetch_unit<BITS>(tile.words + row_words(column, BITS) * kTileRows);
            const Grain<BITS> grain(tile, column / kGrainColumns);
            const float* x = in.x + column;
#pragma GCC unroll 8
            for (int c = 0; c < kGrainColumns; ++c) {
                const F16 code = grain.centred(c);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) {
                    acc[c % kChains][t] = fma(code, set1(x[t * in.columns + c]), acc[c % kChains][t]);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 4
            for (int i = 1; i < kChains; ++i) acc[0][t] = add(acc[0][t], acc[i][t]);
            if (w.zero != nullptr) acc[0][t] = fnma(grid.zero, set1(sums[t]), acc[0][t]);
            y[t] = fma(grid.scale, acc[0][t], y[t]);
        }
        sums += TOKENS;
    });
    const F16 bias = load_bias(args, tile_index);
    for (int t = 0; t < std::min<int64_t>(TOKENS, args.m); ++t) {
        store_outputs(args, tile_index, t, add(y[t], bias));
    }
}

// Sums of x over each segment, whole grains, the zeros after the last column too. In fp64: a sum of x may cancel.
void sum_segments(const Weight& w, int tokens, const float* x, int64_t columns, float* sums) {
    each_segment(w, [&](int64_t begin, int64_t end, int64_t) {
        for (int t = 0; t < tokens; ++t) {
            double lanes[kGrainColumns] = {};
            for (int64_t i = begin; i < end; i += kGrainColumns) {
                for (int c = 0; c < kGrainColumns; ++c) lanes[c] += x[t * columns + i + c];
            }
            *sums++ = static_cast<float>(std::accumulate(lanes, lanes + kGrainColumns, 0.0));
        }
    });
}

template <int BITS, int TOKENS>
void gemm_few(const GemmArgs& args) {
    const Weight& w = args.weight;
    FewTokens in;
    in.columns = ceil_div(w.k, kGrainColumns) * kGrainColumns;
    const AlignedFloats x(TOKENS * in.columns), sums(count_segments(w) * TOKENS);
    std::fill_n(x.data(), TOKENS * in.columns, 0.0f);
    for (int64_t t = 0; t < args.m; ++t)
        load_row(args.x, args.dtype, t * w.k, w.k, x.data() + t * in.columns);
    if (w.zero != nullptr) sum_segments(w, TOKENS, x.data(), in.columns, sums.data());
    in.x = x.data();
    in.sums = sums.data();
    const int threads = useful_threads(args);
    parallel_for(threads, tiles_of(w.n), tiles_in_a_run(args, threads),
                 [&](int64_t tile) { multiply_tile<BITS, TOKENS>(args, in, tile); });
}

// --- many tokens ---

// A block of tokens, transposed by groups of kTokens: group g begins at g * kTokens * k, as [k][its tokens].
struct TokenBlock {
    int64_t first, count;
    const float* x;
};

inline int group_tokens(const TokenBlock& block, int64_t group) {
    return static_cast<int>(std::min<int64_t>(kTokens, block.count - group * kTokens));
}

void transpose_group(const GemmArgs& args, const TokenBlock& block, int64_t group, float* x) {
    constexpr int64_t kRun = 256;
    const int64_t k = args.weight.k;
    const int tokens = group_tokens(block, group);
    float run[kRun];
    x += group * kTokens * k;
    for (int64_t begin = 0; begin < k; begin += kRun) {
        const int64_t count = std::min(kRun, k - begin);
        for (int t = 0; t < tokens; ++t) {
            const int64_t token = block.first + group * kTokens + t;
            load_row(args.x, args.dtype, token * k + begin, count, run);
            for (int64_t i = 0; i < count; ++i) x[(begin + i) * tokens + t] = run[i];
        }
    }
}

// sum[t][16] += panel[columns, 16]^T x[columns][TOKENS]
template <int TOKENS>
void multiply_panel(const float* panel, const float* x, int64_t columns, float* sum) {
    F16 acc[TOKENS];
#pragma GCC unroll 12
    for (int t = 0; t < TOKENS; ++t) acc[t] = set1(0.0f);
    for (int64_t column = 0; column < columns; ++column) {
        const F16 weight = load(panel + column * kTileRows);
#pragma GCC unroll 12
        for (int t = 0; t < TOKENS; ++t) acc[t] = fma(weight, set1(x[column * TOKENS + t]), acc[t]);
    }
#pragma GCC unroll 12
    for (int t = 0; t < TOKENS; ++t) store(sum + t * kTileRows, add(load(sum + t * kTileRows), acc[t]));
}

using MultiplyPanel = void (*)(const float*, const float*, int64_t, float*);

template <int... TOKENS>
MultiplyPanel panel_kernel(int tokens, std::integer_sequence<int, TOKENS...>) {
    static constexpr MultiplyPanel kKernels[] = {multiply_panel<TOKENS + 1>...};
    return kKernels[tokens - 1];
}

template <int BITS>
void multiply_strip(const GemmArgs& args, const TokenBlock& block, int64_t first_tile, int64_t end_tile) {
    alignas(64) float panel[kPanelColumns * kTileRows];
    alignas(64) float sum[kStripTiles * kBlockTokens * kTileRows];
    const Weight& w = args.weight;
    const int64_t stride = block.count * kTileRows;
    std::fill_n(sum, (end_tile - first_tile) * stride, 0.0f);
    for (int64_t begin = 0; begin < w.k; begin += kPanelColumns) {
        const int64_t end = std::min(w.k, begin + kPanelColumns);
        for (int64_t tile = first_tile; tile < end_tile; ++tile) {
            decode_panel<BITS>(w, tile, begin, end, panel);
            for (int64_t group = 0; group * kTokens < block.count; ++group) {
                const int tokens = group_tokens(block, group);
                const float* x = block.x + group * kTokens * w.k + begin * tokens;
                float* out = sum + (tile - first_tile) * stride + group * kTokens * kTileRows;
                panel_kernel(tokens, std::make_integer_sequence<int, kTokens>())(panel, x, end - begin, out);
            }
        }
    }
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        const float* values = sum + (tile - first_tile) * stride;
        const F16 bias = load_bias(args, tile);
        for (int64_t t = 0; t < block.count; ++t) {
            store_outputs(args, tile, block.first + t, add(load(values + t * kTileRows), bias));
        }
    }
}

template <int BITS>
void gemm_many(const GemmArgs& args) {
    const Weight& w = args.weight;
    const int64_t tiles = tiles_of(w.n);
    const int threads = useful_threads(args);
    // Blocks of equal size, and strips small enough that every thread has several.
    const int64_t blocks = ceil_div(args.m, kBlockTokens), block_tokens = ceil_div(args.m, blocks);
    const int64_t strip = std::clamp<int64_t>(tiles / (4 * threads), 1, kStripTiles);
    const AlignedFloats x(block_tokens * w.k);
    for (int64_t first = 0; first < args.m; first += block_tokens) {
        const TokenBlock block = {first, std::min(block_tokens, args.m - first), x.data()};
        parallel_for(threads, ceil_div(block.count, kTokens), 1,
                     [&](int64_t group) { transpose_group(args, block, group, x.data()); });
        parallel_for(threads, ceil_div(tiles, strip), 1, [&](int64_t i) {
            multiply_strip<BITS>(args, block, i * strip, std::min(tiles, (i + 1) * strip));
        });
    }
}

// --- entry ---

template <int BITS>
void gemm_bits(const GemmArgs& args) {
    // Missing tokens are rows of zeros: cheaper than an instantiation for every m.
    if (args.m > kFewTokens) return gemm_many<BITS>(args);
    if (args.m > 6) return gemm_few<BITS, 8>(args);
    if (args.m > 4) return gemm_few<BITS, 6>(args);
    if (args.m > 2) return gemm_few<BITS, 4>(args);
    if (args.m > 1) return gemm_few<BITS, 2>(args);
    if (args.m > 0) return gemm_few<BITS, 1>(args);
}

// W = scale * (q - zero) -> out[n, k], rounded once
template <int BITS>
void dequantize_bits(const DequantizeArgs& args) {
    const Weight& w = args.weight;
    parallel_for(args.threads, tiles_of(w.n), 1, [&](int64_t tile) {
        alignas(64) float panel[kPanelColumns * kTileRows];
        float run[kPanelColumns];
        for (int64_t begin = 0; begin < w.k; begin += kPanelColumns) {
            const int64_t end = std::min(w.k, begin + kPanelColumns);
            decode_panel<BITS>(w, tile, begin, end, panel);
            for (int64_t row = tile * kTileRows; row < std::min(w.n, (tile + 1) * kTileRows); ++row) {
                for (int64_t i = 0; i < end - begin; ++i) run[i] = panel[i * kTileRows + row % kTileRows];
                store_row(run, args.dtype, row * w.k + begin, end - begin, args.out);
            }
        }
    });
}
