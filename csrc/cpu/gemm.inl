// y[m, n] = activation(x[m, k] W[n, k]^T + bias[n])
// W = scale * (q - zero), in the cpu layout (common/layout.h)
//
// x, bias, y: fp32, fp16 or bf16, contiguous; accumulation in fp32. Any m, n, k. Included inside an anonymous
// namespace after decode.inl. A thread owns whole tiles of 16 rows of W: results do not depend on how many.
//
// Few tokens (up to kTokens, as many as there are registers for sums), `multiply_tile`: one pass over the words, codes go
// from a register into the FMA, x is broadcast from memory:
//
//     acc[t] = sum over a segment of x[t][k] * (q[k] - c)     c = 2^(bits-1): little cancels
//     y[t]  += scale * (acc[t] - (zero - c) * sum of x[t])    segment: at most 256 columns of one group
//
// Many tokens, `multiply_strip`: a panel of 16 rows x 256 columns is decoded to fp32 (16 KB, level 1) and
// multiplied with all tokens of a block, up to kTokens at a time; x was transposed once, so that it streams:
//
//             tokens of a block ->                         one panel x one group of tokens:
//      W    +------+------+------+                           for k: acc[t] += panel[k] * x[k][t]
//    4 tiles| acc  |      |      |  level 2                  accumulators stay in registers
//           +------+------+------+

constexpr int64_t kPanelColumns = 256;
constexpr int kStripTiles = 4;
constexpr int64_t kBlockTokens = 264;  // accumulators of a strip take 66 KB

static_assert(kPanelColumns % kGrainColumns == 0, "a panel is made of whole grains");

// --- few tokens ---

// x in fp32 [columns][TOKENS] with columns padded to whole grains, and its sums [segments][TOKENS].
struct FewTokens {
    const float* x;
    const float* sums;
};

// FMA takes 4 cycles, two are under way: with few tokens, columns take turns between chains of sums, 8 registers of them.
template <int TOKENS>
struct FloatSums {
    static constexpr int kChains = std::max(1, (TOKENS >= 8 ? 1 : TOKENS >= 4 ? 2 : 8 / TOKENS) / kRegisters);
    F16 of[TOKENS][kChains];

    MMQ_INLINE void clear() {
        each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA {
            each_number<kChains>([&](auto c) MMQ_INLINE_LAMBDA { of[t][c] = set1(0.0f); });
        });
    }
};

// sums += a grain times its columns of x.
template <int BITS, int TOKENS>
MMQ_INLINE void multiply_grain(const Grain<BITS>& grain, const float* x, FloatSums<TOKENS>& sums) {
    each_number<kGrainColumns>([&](auto c) MMQ_INLINE_LAMBDA {
        const F16 code = grain.centred(c);
        each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA {
            F16& sum = sums.of[t][c % FloatSums<TOKENS>::kChains];
            sum = fma(code, set1(x[c * TOKENS + t]), sum);
        });
    });
}

template <int BITS, int TOKENS>
void multiply_tile(const GemmArgs& args, const FewTokens& in, int64_t tile_index) {
    constexpr int kGrains = kUnitColumns / kGrainColumns;
    const Weight& w = args.weight;
    const int32_t* words = Tile<BITS>(w, tile_index).words;
    const TileGrids<BITS> grids(w, tile_index);
    alignas(64) float y[TOKENS * kTileRows] = {};
    const float* x_sums = in.sums;
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) MMQ_INLINE_LAMBDA {
        FloatSums<TOKENS> sums;
        sums.clear();
        for (int64_t column = begin; column < end;) {
            const int32_t* unit = words + column / kUnitColumns * (BITS * kTileRows);
            const float* x = in.x + column * TOKENS;
            if (column % kUnitColumns == 0 && end - column >= kUnitColumns) {
                fetch_unit<BITS>(unit);
                each_number<kGrains>([&](auto i) MMQ_INLINE_LAMBDA {
                    multiply_grain<BITS, TOKENS>(Grain<BITS>(unit, i), x + i * kGrainColumns * TOKENS, sums);
                });
                column += kUnitColumns;
            } else {
                const int i = static_cast<int>(column % kUnitColumns) / kGrainColumns;
                multiply_grain<BITS, TOKENS>(Grain<BITS>(unit, i), x, sums);
                column += kGrainColumns;
            }
        }
        const Grid grid = grids.load(group);
        each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA {
            F16 sum = sums.of[t][0];
            each_number<FloatSums<TOKENS>::kChains - 1>(
                [&](auto c) MMQ_INLINE_LAMBDA { sum = add(sum, sums.of[t][c + 1]); });
            if (w.zero != nullptr) sum = fnma(grid.zero, set1(x_sums[t]), sum);
            float* to = y + t * kTileRows;
            store(to, fma(grid.scale, sum, load(to)));
        });
        x_sums += TOKENS;
    });
    const F16 bias = load_bias(args, tile_index);
    for (int t = 0; t < std::min<int64_t>(TOKENS, args.m); ++t) {
        store_outputs(args, tile_index, t, add(load(y + t * kTileRows), bias));
    }
}

// Columns [begin, end) of all tokens -> x [k][TOKENS], and their sums over these columns unless that is null. Missing tokens
// are zeros: cheaper than kernels for every number. Sums are made in fp64: they may cancel.
template <int TOKENS>
void load_segment(const GemmArgs& args, int64_t begin, int64_t end, float* x, float* sums) {
    float run[kSegmentColumns];
    const int64_t count = end - begin;
    x += begin * TOKENS;
    for (int64_t t = 0; t < TOKENS; ++t) {
        if (t >= args.m) std::fill_n(run, count, 0.0f);
        if (t < args.m) load_row(args.x, args.dtype, t * args.weight.k + begin, count, run);
        for (int64_t i = 0; i < count; ++i) x[i * TOKENS + t] = run[i];
        if (sums == nullptr) continue;
        double lanes[kGrainColumns] = {};
        int64_t i = 0;
        for (; i + kGrainColumns <= count; i += kGrainColumns) {
            for (int c = 0; c < kGrainColumns; ++c) lanes[c] += run[i + c];
        }
        for (int c = 0; i + c < count; ++c) lanes[c] += run[i + c];
        sums[t] = static_cast<float>(std::accumulate(lanes, lanes + kGrainColumns, 0.0));
    }
}

// `tokens` tokens from `first` on -> x [k][stride], the first so many of each row.
void transpose_tokens(const GemmArgs& args, int64_t first, int64_t tokens, int64_t stride, float* x) {
    constexpr int64_t kRun = 64;  // what a run becomes stays in level 1
    const int64_t k = args.weight.k;
    float run[kRun];
    for (int64_t begin = 0; begin < k; begin += kRun) {
        const int64_t count = std::min(kRun, k - begin);
        for (int64_t t = 0; t < tokens; ++t) {
            load_row(args.x, args.dtype, (first + t) * k + begin, count, run);
            for (int64_t i = 0; i < count; ++i) x[(begin + i) * stride + t] = run[i];
        }
    }
}

template <int BITS, int TOKENS>
void gemm_few(const GemmArgs& args) {
    const Weight& w = args.weight;
    const int64_t columns = ceil_div(w.k, kGrainColumns) * kGrainColumns;
    const AlignedFloats x(TOKENS * columns), sums(count_segments(w) * TOKENS);
    std::fill_n(x.data() + TOKENS * w.k, TOKENS * (columns - w.k), 0.0f);
    const int threads = useful_threads(args);
    const int parts = args.m > 4 ? threads : 1;  // a fork costs more than few tokens
    parallel_for(parts, parts, 1, [&](int64_t part) {
        each_segment_of(w, part, parts, [&](int64_t begin, int64_t end, int64_t segment) {
            float* to = w.zero == nullptr ? nullptr : sums.data() + segment * TOKENS;
            load_segment<TOKENS>(args, begin, end, x.data(), to);
        });
    });
    const FewTokens in = {x.data(), sums.data()};
    parallel_for(threads, tiles_of(w.n), tiles_in_a_run(args, threads),
                 [&](int64_t tile) { multiply_tile<BITS, TOKENS>(args, in, tile); });
}

// --- many tokens ---

// A block of tokens in groups of almost equal size: group g holds tokens [begin(g), begin(g + 1)) of it, transposed at
// x + begin(g) * k as [k][its tokens].
struct TokenBlock {
    int64_t first, count;
    const float* x;

    int64_t groups() const { return ceil_div(count, kTokens); }
    int64_t begin(int64_t group) const { return count * group / groups(); }
    int size(int64_t group) const { return static_cast<int>(begin(group + 1) - begin(group)); }
};

// sum[t][16] += panel[columns, 16]^T x[columns][TOKENS]
template <int TOKENS>
MMQ_REGIONS_CHECKED void multiply_panel(const float* panel, const float* x, int64_t columns, float* sum) {
    check_region(panel, columns * kTileRows);
    check_region(x, columns * TOKENS);
    check_region(sum, TOKENS * kTileRows);
    F16 acc[TOKENS];
    each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA { acc[t] = set1(0.0f); });
    for (int64_t column = 0; column < columns; ++column) {
        const F16 weight = load(panel + column * kTileRows);
        each_number<TOKENS>(
            [&](auto t) MMQ_INLINE_LAMBDA { acc[t] = fma(weight, set1(x[column * TOKENS + t]), acc[t]); });
    }
    each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA {
        store(sum + t * kTileRows, add(load(sum + t * kTileRows), acc[t]));
    });
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
            for (int64_t group = 0; group < block.groups(); ++group) {
                const int tokens = block.size(group);
                const float* x = block.x + block.begin(group) * w.k + begin * tokens;
                float* out = sum + (tile - first_tile) * stride + block.begin(group) * kTileRows;
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
        parallel_for(threads, block.groups(), 1, [&](int64_t group) {
            const int64_t tokens = block.size(group), begin = block.begin(group);
            transpose_tokens(args, first + begin, tokens, tokens, x.data() + begin * w.k);
        });
        parallel_for(threads, ceil_div(tiles, strip), 1, [&](int64_t i) {
            multiply_strip<BITS>(args, block, i * strip, std::min(tiles, (i + 1) * strip));
        });
    }
}

// --- entry ---

// The smallest of the kernels for few tokens that has room for them all.
template <int BITS, int TOKENS, int... MORE>
void gemm_fitting(const GemmArgs& args) {
    if constexpr (sizeof...(MORE) > 0) {
        if (args.m > TOKENS) return gemm_fitting<BITS, MORE...>(args);
    }
    gemm_few<BITS, TOKENS>(args);
}

template <int BITS>
void gemm_bits(const GemmArgs& args) {
    if (args.m == 0) return;
    if (args.m > kTokens) return gemm_many<BITS>(args);
    if constexpr (kTokens >= 24) return gemm_fitting<BITS, 1, 2, 4, 8, 12, 16, 20, 24>(args);
    gemm_fitting<BITS, 1, 2, 4, kTokens>(args);
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
