// y[m, n] = activation(unit[m] * sum over groups g of scale[n, g] * sum over k in g of (q[n, k] - zero[n, g]) * x8[m, k] + bias[n])
// unit[m] = max |x[m]| / 127,   x8[m, k] = rint(x[m, k] / unit[m])
//
// The gemm with activations of 8 bits, rounded anew for each token. W in the cpu layout (common/layout.h); x, bias, y:
// fp32, fp16 or bf16, contiguous. Any m, n, k. Included inside an anonymous namespace after unroll.h, outputs.inl
// and dot_*.h.
//
// Sums of integers are exact: those of a segment, at most 256 columns of one group, are below 255 * 127 * 256 < 2^24.
// They are scaled and added in fp32, one rounding at a time, in the order of the segments; so up to the epilogue all
// instruction sets, any number of threads, and backends/reference.py give the same bits. A token that holds NaN or
// infinity gets outputs of NaN.
//
// Tokens come in blocks, their codes as [step of 4 columns][token][4]. A thread owns whole tiles of 16 rows:
//
//        tokens of a block, kDotTokens             for each step of 4 columns of a segment:
//      +--------------------------+                  codes = words of the step: one shift and one mask a plane
//   W  | acc[kDotTiles][kDotTokens]  registers       acc[i][t] += sum of 4 products codes[i] * x8[step][t]
//      +--------------------------+                at its end:  y[i][t] += scale[i] * acc[i][t]        level 1
//
// The words are decoded once for each block of tokens, which costs less than writing them down: a step of 4 bits is
// one and a half operations beside kDotTokens dot products.

constexpr int64_t kSharedBytes = 3 << 18;  // codes of x that tiles take turns with: most of level 2
constexpr int kGrains = kUnitColumns / kGrainColumns;
constexpr int kGrainSteps = kGrainColumns / kStepColumns;

// Blocks of tokens that there are kernels for; of missing tokens all codes are 0.
constexpr int kDotBlocks[] = {1, 4, 8, 12};
constexpr int block_for(int64_t tokens) {
    for (int size : kDotBlocks) {
        if (size >= tokens || size == kDotTokens) return size;
    }
    return kDotTokens;
}

// --- tokens ---

// Tokens [first, first + count) as codes. Block b of them begins at token b * kDotTokens and has block_for(rest) tokens.
struct CodedTokens {
    int64_t first, count;
    int64_t steps, segments;
    int8_t* codes;   // of a block [steps][tokens][4]
    int32_t* minus;  // of a block [segments][tokens], sums of codes, negated
    float* unit;     // [tokens]
};

// max |x| / 127, at least the smallest normal number; NaN where x holds NaN or infinity.
float unit_of(const float* x, int64_t count) {
    constexpr int kLanes = 64;  // several registers: a maximum waits for the one before it
    float most[kLanes] = {}, poison[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float size = std::fabs(x[i + lane]);
            most[lane] = size > most[lane] ? size : most[lane];
            poison[lane] += size * 0.0f;
        }
    }
    for (; i < count; ++i) {
        most[0] = std::max(most[0], std::fabs(x[i]));
        poison[0] += x[i] * 0.0f;
    }
    const float unit = *std::max_element(most, most + kLanes) / 127.0f;
    return std::max(unit, smallest_normal(Dtype::kFloat32)) + std::accumulate(poison, poison + kLanes, 0.0f);
}

// One token: its codes to every `tokens`-th group of 4 bytes, columns past k zero, and its sums and unit.
void code_token(const GemmArgs& args, const CodedTokens& to, int64_t token, float* x, int8_t* row) {
    constexpr float kRound =
        12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction, halves to even
    const Weight& w = args.weight;
    const int64_t block = token / kDotTokens * kDotTokens, lane = token - block;
    const int tokens = block_for(to.count - block);
    std::memset(row, 0, static_cast<size_t>(to.steps * kStepColumns));
    if (token < to.count) {
        load_row(args.x, args.dtype, (to.first + token) * w.k, w.k, x);
        const float unit = to.unit[token] = unit_of(x, w.k);
        if (unit == unit) {
            for (int64_t i = 0; i < w.k; ++i)
                row[i] = static_cast<int8_t>(static_cast<int>((x[i] / unit + kRound) - kRound));
        }
    }
    int8_t* codes = to.codes + (block * to.steps + lane) * kStepColumns;
    for (int64_t step = 0; step < to.steps; ++step)
        std::memcpy(codes + step * tokens * kStepColumns, row + step * kStepColumns, kStepColumns);
    int32_t* minus = to.minus + block * to.segments + lane;
    each_segment(w, [&](int64_t begin, int64_t end, int64_t) {
        int32_t sum = 0;
        for (int64_t i = begin; i < end; ++i) sum += row[i];
        *minus = -sum;
        minus += tokens;
    });
}

// --- a block of tokens and a few tiles ---

// The sums of a block. Few tokens take one tile at a time, in memory's order, and their steps take turns between chains:
// a dot product takes 4 cycles.
template <int TOKENS>
struct Sums {
    static constexpr int kTiles = TOKENS < 4 ? 1 : kDotTiles;
    static constexpr int kChains = TOKENS < 4 ? 4 / TOKENS : 1;
    I16 of[kTiles][TOKENS][kChains];
};

// The codes of a step, 4 columns of 16 rows. Words are asked for ahead one line at a time, as they are loaded: a whole unit at
// once takes longer where little is done with each, as with 8 bits.
template <int BITS, int STEP>
MMQ_INLINE I16 codes_of_step(const int32_t* unit) {
    constexpr Planes kPlanes = planes_of(BITS);
    const auto line = [&](int number, bool first) MMQ_INLINE_LAMBDA {
        const int32_t* words = unit + number * kTileRows;
        if (first) fetch<1>(words, kFetchAhead);
        return load_words(words);
    };
    if constexpr (BITS == 8) {
        return line(STEP, true);
    } else {
        I16 codes = set1_word(0);
        each_number<kPlanes.count>([&](auto p) MMQ_INLINE_LAMBDA {
            constexpr int kWidth = kPlanes.width[p], kLow = kPlanes.low[p];
            constexpr int kAlong = kWidth * STEP, kRight = kAlong % 8 - kLow;
            constexpr int32_t kField = (((1 << kWidth) - 1) << kLow) * 0x01010101;
            const I16 word = line(kLow + kAlong / 8, kAlong % 8 == 0);
            const I16 bits =
                mask(kRight >= 0 ? shift_right(word, kRight) : shift_left(word, -kRight), kField);
            codes = p == 0 ? bits : either(codes, bits);
        });
        return codes;
    }
}

// The same of a step that is not known at compile time: for the ends of segments that are no whole units.
template <int BITS>
MMQ_INLINE I16 codes_of_any_step(const int32_t* unit, int step) {
    constexpr Planes kPlanes = planes_of(BITS);
    I16 codes = set1_word(0);
    for (int p = 0; p < kPlanes.count; ++p) {
        const int along = kPlanes.width[p] * step;
        const I16 word = load_words(unit + (kPlanes.low[p] + along / 8) * kTileRows);
        const uint32_t low_bits = ((1u << kPlanes.width[p]) - 1) * 0x01010101u;
        const I16 field = mask(shift_right(word, along % 8), static_cast<int32_t>(low_bits));
        codes = either(codes, shift_left(field, kPlanes.low[p]));
    }
    return codes;
}

// sums += codes(tile) of one step * those of the tokens at x.
template <int BITS, int STEP, int TOKENS, class Codes>
MMQ_INLINE void multiply_step(const Codes& codes_of, const int8_t* x, Sums<TOKENS>& sums) {
    constexpr int kTiles = Sums<TOKENS>::kTiles, kChain = STEP % Sums<TOKENS>::kChains;
    I16 codes[kTiles];
    each_number<kTiles>([&](auto i) MMQ_INLINE_LAMBDA { codes[i] = codes_of(i); });
    each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA {
        const I16 four = four_codes(x + t * kStepColumns);
        each_number<kTiles>([&](auto i) MMQ_INLINE_LAMBDA {
            sums.of[i][t][kChain] = dot<BITS>(sums.of[i][t][kChain], codes[i], four);
        });
    });
}

// sums += codes of grains [begin, end) of the tiles at `words` * those of the tokens at x.
template <int BITS, int TOKENS>
MMQ_INLINE void multiply_segment(const int32_t* const* words, const int8_t* x, int64_t begin, int64_t end,
                                 Sums<TOKENS>& sums) {
    static_assert(kGrains == 4 && kGrainSteps == 2, "a unit is four grains of two steps");
    constexpr int64_t kGrainCodes = kGrainSteps * TOKENS * kStepColumns;
    const int32_t* unit[Sums<TOKENS>::kTiles];
    for (int64_t grain = begin; grain < end;) {
        each_number<Sums<TOKENS>::kTiles>(
            [&](auto i) MMQ_INLINE_LAMBDA { unit[i] = words[i] + grain / kGrains * (BITS * kTileRows); });
        const int8_t* codes = x + grain * kGrainCodes;
        if (grain % kGrains == 0 && end - grain >= kGrains) {
            each_number<kGrains * kGrainSteps>([&](auto step) MMQ_INLINE_LAMBDA {
                multiply_step<BITS, step>(
                    [&](auto i) MMQ_INLINE_LAMBDA { return codes_of_step<BITS, step>(unit[i]); },
                    codes + step * TOKENS * kStepColumns, sums);
            });
            grain += kGrains;
        } else {
            const int first = static_cast<int>(grain++ % kGrains) * kGrainSteps;
            each_number<kGrainSteps>([&](auto s) MMQ_INLINE_LAMBDA {
                multiply_step<BITS, s>(
                    [&](auto i) MMQ_INLINE_LAMBDA { return codes_of_any_step<BITS>(unit[i], first + s); },
                    codes + s * TOKENS * kStepColumns, sums);
            });
        }
    }
}

// Zero points of 16 rows as integers.
template <int BITS>
inline I16 load_zero(const TileGrids<BITS>& grids, int64_t group) {
    return grids.symmetric() ? set1_word(middle_code(BITS)) : to_words(grids.zero_codes(group));
}

// Tiles from first_tile on, as many as a block takes at a time, and the tokens that begin at token `block`.
template <int BITS, int TOKENS>
void multiply_tokens(const GemmArgs& args, const CodedTokens& in, int64_t first_tile, int64_t block) {
    using Block = Sums<TOKENS>;
    const Weight& w = args.weight;
    int64_t tile[Block::kTiles];
    const int32_t* words[Block::kTiles];
    F16 y[Block::kTiles][TOKENS];
    for (int i = 0; i < Block::kTiles; ++i) {
        tile[i] =
            std::min(first_tile + i, tiles_of(w.n) - 1);  // a last odd tile is computed twice, stored once
        words[i] = w.words + tile[i] * row_words(w.k, BITS) * kTileRows;
        for (int t = 0; t < TOKENS; ++t) y[i][t] = set1(0.0f);
    }
    const TileGrids<BITS> grids[2] = {{w, tile[0]}, {w, tile[Block::kTiles - 1]}};
    const int8_t* codes = in.codes + block * in.steps * kStepColumns;
    const int32_t* minus = in.minus + block * in.segments;
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) {
        Block sums;
        each_number<Block::kTiles>([&](auto i) MMQ_INLINE_LAMBDA {
            grids[i].fetch_next(group);
            const I16 zero = load_zero<BITS>(grids[i], group);
            each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA {
                sums.of[i][t][0] = mul_words(zero, set1_word(minus[t]));
                each_number<Block::kChains - 1>(
                    [&](auto c) MMQ_INLINE_LAMBDA { sums.of[i][t][c + 1] = set1_word(0); });
            });
        });
        multiply_segment<BITS, TOKENS>(words, codes, begin / kGrainColumns, ceil_div(end, kGrainColumns),
                                       sums);
        each_number<Block::kTiles>([&](auto i) MMQ_INLINE_LAMBDA {
            const F16 scale = grids[i].scale(group);
            each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA {
                I16 sum = sums.of[i][t][0];
                each_number<Block::kChains - 1>(
                    [&](auto c) MMQ_INLINE_LAMBDA { sum = add_words(sum, sums.of[i][t][c + 1]); });
                y[i][t] = add(y[i][t], mul(scale, to_float(sum)));
            });
        });
        minus += TOKENS;
    });
    const int64_t tokens = std::min<int64_t>(TOKENS, in.count - block);
    for (int i = 0; i < Block::kTiles && first_tile + i < tiles_of(w.n); ++i) {
        const F16 bias = load_bias(args, tile[i]);
        for (int64_t t = 0; t < tokens; ++t) {
            const F16 value = add(mul(y[i][t], set1(in.unit[block + t])), bias);
            store_outputs(args, tile[i], in.first + block + t, value);
        }
    }
}

template <int BITS, int TOKENS>
void multiply_tiles(const GemmArgs& args, const CodedTokens& in, int64_t first_tile, int64_t block) {
    const int64_t end = std::min(first_tile + kDotTiles, tiles_of(args.weight.n));
    for (int64_t tile = first_tile; tile < end; tile += Sums<TOKENS>::kTiles)
        multiply_tokens<BITS, TOKENS>(args, in, tile, block);
}

// --- entry ---

template <int BITS>
void multiply_block(const GemmArgs& args, const CodedTokens& in, int64_t first_tile, int64_t block) {
    switch (block_for(in.count - block)) {
        case 1:
            return multiply_tiles<BITS, 1>(args, in, first_tile, block);
        case 4:
            return multiply_tiles<BITS, 4>(args, in, first_tile, block);
        default:
            if constexpr (kDotTokens > 4) {
                if (block_for(in.count - block) == 8)
                    return multiply_tiles<BITS, 8>(args, in, first_tile, block);
                return multiply_tiles<BITS, kDotTokens>(args, in, first_tile, block);
            }
    }
}

template <int BITS>
void gemm_integer_bits(const GemmArgs& args) {
    const Weight& w = args.weight;
    const int threads = useful_threads(args);
    const int64_t steps = units_of(w.k) * (kUnitColumns / kStepColumns), segments = count_segments(w);
    // As many tokens at a time as level 2 holds codes of, in parts of equal size.
    const int64_t most =
        std::max<int64_t>(1, kSharedBytes / (steps * kStepColumns * kDotTokens)) * kDotTokens;
    const int64_t parts = std::max<int64_t>(1, ceil_div(args.m, most));
    const int64_t part = ceil_div(ceil_div(args.m, parts), kDotTokens) * kDotTokens;
    const AlignedFloats codes(part * steps), sums(part * segments), unit(part);
    const AlignedFloats rows(threads * w.k), coded(threads * steps);
    for (int64_t first = 0; first < args.m; first += part) {
        const CodedTokens in = {
            first,      std::min(part, args.m - first),          steps,
            segments,   reinterpret_cast<int8_t*>(codes.data()), reinterpret_cast<int32_t*>(sums.data()),
            unit.data()};
        const int64_t padded = (in.count - 1) / kDotTokens * kDotTokens +
                               block_for(in.count - (in.count - 1) / kDotTokens * kDotTokens);
        const int coders = padded > 2 ? threads : 1;
        parallel_for(coders, threads, 1, [&](int64_t share) {
            for (int64_t t = padded * share / threads; t < padded * (share + 1) / threads; ++t) {
                code_token(args, in, t, rows.data() + share * w.k,
                           reinterpret_cast<int8_t*>(coded.data()) + share * steps * kStepColumns);
            }
        });
        const int64_t run = ceil_div(tiles_in_a_run(args, threads), kDotTiles);
        parallel_for(threads, ceil_div(tiles_of(w.n), kDotTiles), run, [&](int64_t i) {
            for (int64_t block = 0; block < in.count; block += kDotTokens)
                multiply_block<BITS>(args, in, i * kDotTiles, block);
        });
    }
}
