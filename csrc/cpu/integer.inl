// y[m, n] = activation(sum over segments of scale[n, g] * (sum over k of (q[n, k] - zero[n, g]) * x[m, k]) + bias[n])
//
// The gemm whose x are integers: a Coding (rounded.inl, fixed.inl) turns each token into kDigits streams of int8 and says
// what their sums are worth. W in the cpu layout (common/layout.h); x, bias, y: fp32, fp16 or bf16, contiguous. Any m, n, k.
// Included inside an anonymous namespace after steps.inl.
//
//   struct Coding {
//       static constexpr int kDigits;
//       static constexpr bool kApart;   // whether some columns may be left out of the digits, and multiplied as floats
//       static constexpr bool kBlocks;  // whether there may be more tokens than one block has
//       // A token, x[k], to its streams and units; false where it cannot be. `row` is room for k bytes and more.
//       static bool code(const CodedTokens& to, const Weight& w, int64_t token, const float* x, int8_t* row);
//       // y + scale * what a segment's sums of the digits are worth; what y is worth at the end.
//       static F16 add_segment(F16 y, F16 scale, const I16* sums, float unit);
//       static F16 finish(F16 y, float unit);
//   };
//
// Sums of a segment are exact integers (steps.inl). They are scaled and added in fp32 in the order of the segments, by one
// thread for each tile: any number of threads gives the same bits.
//
// Tokens come in blocks, of as many as there are registers for. `multiply_block` decodes the words once for each block, which
// costs little beside kMostStreams dot products. Where these are cheap and registers few (kPairSums), `multiply_blocks` decodes
// a segment of one tile after another to a panel in level 1, and each meets all blocks of tokens there.

constexpr int64_t kSharedBytes = 3 << 18;  // codes of x that tiles take turns with: most of level 2
constexpr int64_t kPartTokens = 264;       // their y, of a strip, is 68 KB
constexpr int64_t kStrip = 4;              // tiles that codes of x are read for once

// A column that a token's digits leave out, and its number.
struct Apart {
    uint32_t token, column;
    float x;
};

// Tokens [first, first + count) as streams of codes, `digits` a token. A block of them begins at every `most`-th token and has
// tokens_of(block) of them, those that are missing with codes of 0.
struct CodedTokens {
    int64_t first, count, most, digits;
    int64_t steps, segments, most_apart;
    int8_t* codes;       // of a block [steps][tokens][digits][4]
    int32_t* minus;      // of a block [segments][tokens][digits], sums of codes, negated
    float* unit;         // of a block [segments][tokens]
    Apart* apart;        // [tokens][most_apart]
    int32_t* apart_end;  // [tokens][segments], the end of a segment's
    Apart* all_apart;    // those of all tokens, segment after segment
    int32_t* all_end;    // [segments]

    int64_t block_of(int64_t token) const { return token / most * most; }
    int64_t tokens_of(int64_t block) const { return block_for(std::min(most, count - block)); }
    // Where what belongs to a token begins. From one step or segment to the next it is as far as its block has tokens.
    int8_t* codes_of(int64_t token) const { return codes + place(token, steps) * digits * kStepColumns; }
    int32_t* minus_of(int64_t token) const { return minus + place(token, segments) * digits; }
    float* unit_of(int64_t token) const { return unit + place(token, segments); }
    Apart* apart_of(int64_t token) const { return apart + token * most_apart; }
    int32_t* apart_end_of(int64_t token) const { return apart_end + token * segments; }

  private:
    int64_t place(int64_t token, int64_t lines) const {
        return block_of(token) * lines + token - block_of(token);
    }
};

// Columns apart that a token may have: each takes as long as several columns of digits.
constexpr int64_t most_apart(int64_t columns) {
    return ceil_div(columns, 16);
}

// op of all lanes, halves at a time.
template <int LANES, class Op>
MMQ_INLINE float folded(float* lanes, const Op& op) {
    if constexpr (LANES == 1) {
        return lanes[0];
    } else {
        for (int i = 0; i < LANES / 2; ++i) lanes[i] = op(lanes[i], lanes[i + LANES / 2]);
        return folded<LANES / 2>(lanes, op);
    }
}

// --- a block of tokens and a few tiles ---

struct Segment {
    int64_t begin, end, group, number;
};

// Zero points of 16 rows as integers.
template <int BITS>
MMQ_INLINE I16 load_zero(const TileGrids<BITS>& grids, int64_t group) {
    grids.fetch_next(group);
    return grids.symmetric() ? set1_word(middle_code(BITS)) : to_words(grids.zero_codes(group));
}

// body(token, a column of W, x) for the columns apart of a segment and a tile.
template <class Source, class Body>
MMQ_INLINE void each_apart(const CodedTokens& in, int64_t segment, const Source& source, F16 scale, I16 zero,
                           const Body& body) {
    const int32_t begin = segment == 0 ? 0 : in.all_end[segment - 1];
    for (int32_t i = begin; i < in.all_end[segment]; ++i) {
        const Apart& apart = in.all_apart[i];
        body(apart.token, mul(scale, to_float(sub_words(source.column(apart.column), zero))), set1(apart.x));
    }
}

// y[tile][token] += a segment of tiles times the tokens of a block.
template <int BITS, int TOKENS, class Coding, class Source>
MMQ_INLINE void multiply_tokens(const CodedTokens& in, const TileGrids<BITS>* grids, const I16* zeros,
                                const Source* sources, const Segment& segment, int64_t block,
                                F16 (*y)[TOKENS]) {
    constexpr int kDigits = Coding::kDigits, kStreams = TOKENS * kDigits;
    using Block = Sums<kStreams>;
    const int32_t* minus = in.minus + (block * in.segments + segment.number * TOKENS) * kDigits;
    const float* unit = in.unit + block * in.segments + segment.number * TOKENS;
    const int8_t* codes = in.codes + block * in.steps * (kDigits * kStepColumns);
    Block sums;
    each_number<Block::kTiles>([&](auto i) MMQ_INLINE_LAMBDA {
        each_number<kStreams>([&](auto s) MMQ_INLINE_LAMBDA {
            sums.of[i][s][0] = mul_words(zeros[i], set1_word(minus[s]));
            each_number<Block::kChains - 1>([&](auto c)
                                                MMQ_INLINE_LAMBDA { sums.of[i][s][c + 1] = set1_word(0); });
        });
    });
    multiply_segment<BITS, kStreams>(sources, codes, segment.begin / kGrainColumns,
                                     ceil_div(segment.end, kGrainColumns), sums);
    each_number<Block::kTiles>([&](auto i) MMQ_INLINE_LAMBDA {
        const F16 scale = grids[i].scale(segment.group);
        each_number<TOKENS>([&](auto t) MMQ_INLINE_LAMBDA {
            I16 all[kDigits];
            each_number<kDigits>([&](auto d) MMQ_INLINE_LAMBDA {
                all[d] = sums.of[i][t * kDigits + d][0];
                each_number<Block::kChains - 1>([&](auto c) MMQ_INLINE_LAMBDA {
                    all[d] = add_words(all[d], sums.of[i][t * kDigits + d][c + 1]);
                });
            });
            y[i][t] = Coding::add_segment(y[i][t], scale, all, unit[t]);
        });
    });
}

// body(the number of tokens of a block), a constant.
template <int MOST, class Body>
MMQ_INLINE void with_block_size(int64_t tokens, const Body& body) {
    each_number<kBlockSizes>([&](auto i) MMQ_INLINE_LAMBDA {
        constexpr int kSize = kDotBlocks[i];
        if constexpr (kSize <= MOST) {
            if (tokens == kSize) body(std::integral_constant<int, kSize>());
        }
    });
}

template <class Coding>
inline void store_token(const GemmArgs& args, const CodedTokens& in, int64_t tile, int64_t block, int64_t t,
                        F16 y, F16 bias) {
    store_outputs(args, tile, in.first + block + t, add(Coding::finish(y, in.unit_of(block)[t]), bias));
}

// kDotTiles tiles from first_tile on, or as many as are left, times a block of tokens: one pass over their words.
template <int BITS, int TOKENS, class Coding>
void multiply_block(const GemmArgs& args, const CodedTokens& in, int64_t first_tile, int64_t block) {
    using Block = Sums<TOKENS * Coding::kDigits>;
    const Weight& w = args.weight;
    const int64_t tiles = tiles_of(w.n), end = std::min(first_tile + kDotTiles, tiles);
    for (int64_t first = first_tile; first < end; first += Block::kTiles) {
        // A last odd tile is computed twice, stored once.
        const int64_t second = std::min(first + Block::kTiles - 1, tiles - 1);
        const TileGrids<BITS> grids[2] = {{w, first}, {w, second}};
        const FromWords<BITS> sources[2] = {{Tile<BITS>(w, first).words}, {Tile<BITS>(w, second).words}};
        F16 y[Block::kTiles][TOKENS];
        for (int i = 0; i < Block::kTiles; ++i) {
            for (int t = 0; t < TOKENS; ++t) y[i][t] = set1(0.0f);
        }
        int64_t number = 0;
        each_segment(w, [&](int64_t begin, int64_t stop, int64_t group) MMQ_INLINE_LAMBDA {
            I16 zeros[Block::kTiles];
            each_number<Block::kTiles>([&](auto i)
                                           MMQ_INLINE_LAMBDA { zeros[i] = load_zero(grids[i], group); });
            multiply_tokens<BITS, TOKENS, Coding>(in, grids, zeros, sources,
                                                  Segment{begin, stop, group, number}, block, y);
            if constexpr (Coding::kApart) {
                static_assert(Block::kTiles == 1,
                              "columns apart are of one tile, and of the tokens of the only block");
                each_apart(in, number, sources[0], grids[0].scale(group), zeros[0],
                           [&](int64_t token, F16 w, F16 x)
                               MMQ_INLINE_LAMBDA { y[0][token] = fma(w, x, y[0][token]); });
            }
            ++number;
        });
        const int64_t tokens = std::min<int64_t>(TOKENS, in.count - block);
        for (int64_t i = 0; i < Block::kTiles && first + i < end; ++i) {
            const F16 bias = load_bias(args, first + i);
            for (int64_t t = 0; t < tokens; ++t)
                store_token<Coding>(args, in, first + i, block, t, y[i][t], bias);
        }
    }
}

// A strip of tiles times all blocks of tokens, a segment at a time.
template <int BITS, int MOST, class Coding>
void multiply_blocks(const GemmArgs& args, const CodedTokens& in, int64_t first_tile, int64_t end_tile) {
    static_assert(Sums<MOST * Coding::kDigits>::kTiles == 1, "a panel is of one tile");
    constexpr int64_t kPanelUnits = kSegmentColumns / kUnitColumns + 1;  // segments begin anywhere in a unit
    alignas(64) int32_t panel[kPanelUnits * FromPanel<BITS>::kUnitWords];
    alignas(64) float sums[kStrip * (kPartTokens + MOST) * kTileRows];
    const Weight& w = args.weight;
    const int64_t stride = (in.count + MOST) * kTileRows;
    std::fill_n(sums, (end_tile - first_tile) * stride, 0.0f);
    int64_t number = 0;
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) MMQ_INLINE_LAMBDA {
        const Segment segment = {begin, end, group, number++};
        for (int64_t tile = first_tile; tile < end_tile; ++tile) {
            float* y = sums + (tile - first_tile) * stride;
            const TileGrids<BITS> grids(w, tile);
            const I16 zero = load_zero(grids, group);
            const FromPanel<BITS> source = {Tile<BITS>(w, tile).words, panel, begin / kUnitColumns};
            decode_codes<BITS>(source.words, source.first, ceil_div(end, kUnitColumns), panel);
            for (int64_t block = 0; block < in.count; block += in.most) {
                with_block_size<MOST>(in.tokens_of(block), [&](auto tokens) MMQ_INLINE_LAMBDA {
                    float* to = y + block * kTileRows;
                    F16 of[1][tokens];
                    each_number<tokens>([&](auto t)
                                            MMQ_INLINE_LAMBDA { of[0][t] = load(to + t * kTileRows); });
                    multiply_tokens<BITS, tokens, Coding>(in, &grids, &zero, &source, segment, block, of);
                    each_number<tokens>([&](auto t)
                                            MMQ_INLINE_LAMBDA { store(to + t * kTileRows, of[0][t]); });
                });
            }
            if constexpr (Coding::kApart) {
                each_apart(in, segment.number, source, grids.scale(group), zero,
                           [&](int64_t token, F16 column, F16 x) MMQ_INLINE_LAMBDA {
                               float* to = y + token * kTileRows;
                               store(to, fma(column, x, load(to)));
                           });
            }
        }
    });
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        const float* y = sums + (tile - first_tile) * stride;
        const F16 bias = load_bias(args, tile);
        for (int64_t t = 0; t < in.count; ++t) {
            const int64_t block = in.block_of(t);
            store_token<Coding>(args, in, tile, block, t - block, load(y + t * kTileRows), bias);
        }
    }
}

// --- entry ---

// False where a token could not be coded.
template <class Coding>
bool code_tokens(const GemmArgs& args, const CodedTokens& to, int threads) {
    const Weight& w = args.weight;
    const int64_t last = to.block_of(to.count - 1), padded = last + to.tokens_of(last);
    const int coders = padded > 2 ? threads : 1;
    const AlignedFloats rows(coders * w.k), coded(coders * to.steps);
    std::atomic<bool> all{true};
    parallel_for(coders, coders, 1, [&](int64_t share) {
        float* x = rows.data() + share * w.k;
        int8_t* row = reinterpret_cast<int8_t*>(coded.data() + share * to.steps);
        for (int64_t t = padded * share / coders; t < padded * (share + 1) / coders; ++t) {
            if (t < to.count) load_row(args.x, args.dtype, (to.first + t) * w.k, w.k, x);
            if (t >= to.count) std::fill_n(x, w.k, 0.0f);
            if (all && !Coding::code(to, w, t, x, row)) all = false;
        }
    });
    return all;
}

// The columns apart of all tokens, brought together by segment.
inline void gather_apart(const CodedTokens& in) {
    int32_t count = 0;
    for (int64_t segment = 0; segment < in.segments; ++segment) {
        for (int64_t token = 0; token < in.count; ++token) {
            const int32_t* end = in.apart_end_of(token) + segment;
            for (int32_t i = segment == 0 ? 0 : end[-1]; i < *end; ++i)
                in.all_apart[count++] = in.apart_of(token)[i];
        }
        in.all_end[segment] = count;
    }
}

// False, and y is not worth anything, where a token could not be coded.
template <int BITS, class Coding>
bool multiply_coded(const GemmArgs& args) {
    constexpr int kDigits = Coding::kDigits, kMost = most_tokens(kMostStreams<BITS> / kDigits);
    if (args.m == 0) return true;
    const Weight& w = args.weight;
    const int threads = useful_threads(args);
    const int64_t steps = units_of(w.k) * kUnitSteps, segments = count_segments(w);
    // As many tokens at a time as level 2 holds codes of, in parts of equal size.
    const int64_t fit = kSharedBytes / (steps * kStepColumns * kDigits * kMost);
    const int64_t most = std::clamp<int64_t>(fit, 1, kPartTokens / kMost) * kMost;
    const int64_t part = ceil_div(ceil_div(args.m, ceil_div(args.m, most)), kMost) * kMost;
    // Of 6 tokens 3 and 3, not 5 and 1. With few sizes of blocks that would leave more of them empty.
    const int64_t tokens = std::min(part, args.m);
    const int64_t block = kPairSums ? ceil_div(tokens, ceil_div(tokens, kMost)) : kMost;
    const int64_t apart = Coding::kApart ? most_apart(w.k) : 0;
    const AlignedFloats codes(part * steps * kDigits), minus(part * segments * kDigits),
        unit(part * segments), columns_apart(2 * part * apart * (sizeof(Apart) / sizeof(float))),
        apart_ends((part + 1) * segments);
    Apart* of_tokens = reinterpret_cast<Apart*>(columns_apart.data());
    int32_t* ends = reinterpret_cast<int32_t*>(apart_ends.data());
    for (int64_t first = 0; first < args.m; first += part) {
        const CodedTokens in = {first,
                                std::min(part, args.m - first),
                                block,
                                kDigits,
                                steps,
                                segments,
                                apart,
                                reinterpret_cast<int8_t*>(codes.data()),
                                reinterpret_cast<int32_t*>(minus.data()),
                                unit.data(),
                                of_tokens,
                                ends,
                                of_tokens + part * apart,
                                ends + part * segments};
        if (!code_tokens<Coding>(args, in, threads)) return false;
        if constexpr (Coding::kApart) gather_apart(in);
        if constexpr (kPairSums && Coding::kBlocks) {
            if (in.count > kMost) {
                const int64_t tiles = tiles_of(w.n);
                const int64_t strip = std::clamp<int64_t>(tiles / (4 * threads), 1, kStrip);
                parallel_for(threads, ceil_div(tiles, strip), 1, [&](int64_t i) {
                    multiply_blocks<BITS, kMost, Coding>(args, in, i * strip,
                                                         std::min(tiles, (i + 1) * strip));
                });
                continue;
            }
        }
        const int64_t run = ceil_div(tiles_in_a_run(args, threads), kDotTiles);
        parallel_for(threads, ceil_div(tiles_of(w.n), kDotTiles), run, [&](int64_t i) {
            for (int64_t begin = 0; begin < in.count; begin += block) {
                with_block_size<kMost>(in.tokens_of(begin), [&](auto size) MMQ_INLINE_LAMBDA {
                    multiply_block<BITS, size, Coding>(args, in, i * kDotTiles, begin);
                });
            }
        });
    }
    return true;
}
