// y[m, n] = activation(x[m, k] W[n, k]^T + bias[n]) by vdpbf16ps
// W = scale * (q - zero), in the cpu layout (common/layout.h)
//
// Codes centred on c = 2^(bits-1) are integers that bf16 holds exactly; so does it x in bf16, and x in fp16 or fp32 as the
// sum of two or three terms. So products are exact, they are added up in fp32, and the weight is never rounded. A **stream**
// is one term of one token (streams.inl), and the kernels know only streams: they are added up at the end. Included inside an
// anonymous namespace after pairs_avx512.h, outputs.inl and streams.inl. For each segment (at most 256 columns of one group):
//
//     y[s] += scale * (sum of x[s][k] * (q[k] - c)  -  (zero - c) * sum of x[s][k])
//
// Few streams, `multiply_tile`: codes go from a register into the products, x is broadcast from memory. There are kernels
// for groups of up to 20 streams, which leaves registers for tables beside the sums; up to 20 it is one pass over the words,
// which are fetched well ahead.
//
// Many streams, `multiply_strip`: the codes of a segment of two tiles become a panel of bf16 pairs (at most 18 KB, level 1),
// which meets the streams twelve at a time, while the next panel is decoded; a pass over the words serves 264:
//
//             streams of a block ->                  panel: [pairs][2 tiles][16 rows] of two codes
//      W    +------+------+------+                   x:     [pairs][12 streams] of two values
//    2 tiles| 2x12 |      |      |  level 2          for pair: acc[s][r] += panel[pair][r] . x[pair][s]
//           +------+------+------+                   at the end of a segment: y[s][r] += scale * acc[s][r]

constexpr int kMostStreams = 20;
constexpr int kPanelTiles = 2, kPanelStreams = 12;
constexpr int64_t kBlockStreams = 264;  // y of a strip takes 33 KB

// sum + the products of 16 rows with a pair from memory: one instruction, of which GCC 12 makes two.
inline __m512 dot(__m512 sum, __m512i codes, const uint32_t* pair) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*pair));
    return sum;
}

// --- a tile and a group of streams ---

// The pairs of a unit, [16][STREAMS], with zeros outside columns [begin, end) of it.
template <int STREAMS>
inline void mask_unit(const uint32_t* x, int64_t begin, int64_t end, uint32_t* masked) {
    constexpr int kLanes = 16;
    for (int i = 0; i < STREAMS; ++i) {
        auto lanes_before = [&](int64_t column) {
            return (1u << std::clamp<int64_t>(column / 2 * STREAMS - i * kLanes, 0, kLanes)) - 1;
        };
        const __mmask16 inside = static_cast<__mmask16>(lanes_before(end) & ~lanes_before(begin));
        _mm512_store_si512(masked + i * kLanes, _mm512_maskz_loadu_epi32(inside, x + i * kLanes));
    }
}

// Two instructions of 6 cycles are under way: with few streams, pairs take turns between chains of sums, 2^i of them.
constexpr int chains_for(int streams) {
    int chains = 1;
    while (chains < 8 && 2 * chains * streams <= 16) chains *= 2;
    return chains;
}

template <int STREAMS>
struct PairSums {
    static constexpr int kChains = chains_for(STREAMS);
    __m512 of[STREAMS][kChains];

    MMQ_INLINE void clear() {
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            each_number<kChains>([&](auto c) MMQ_INLINE_LAMBDA { of[s][c] = _mm512_setzero_ps(); });
        });
    }

    // The chains of a stream added up, neighbours first.
    template <int S, int FIRST = 0, int COUNT = kChains>
    MMQ_INLINE __m512 total() const {
        if constexpr (COUNT == 1) {
            return of[S][FIRST];
        } else {
            return add(total<S, FIRST, COUNT / 2>(), total<S, FIRST + COUNT / 2, COUNT / 2>());
        }
    }
};

// Where a product is for few streams, two terms of a code cost less than making one of them.
template <int BITS, int STREAMS, Codes CODES>
constexpr Codes kCodesOfTile = BITS >= 7 && STREAMS <= 2 ? Codes::kTerms : CODES;

// sums += the unit at `words` times the pairs of x.
template <int BITS, Codes CODES, int STREAMS>
MMQ_INLINE void multiply_unit(const int32_t* words, const uint32_t* x, PairSums<STREAMS>& sums) {
    constexpr int kTerms = CODES == Codes::kTerms ? 2 : 1;
    PairUnit<BITS> unit;
    unit.words = words;
    fetch_unit<BITS>(words);
    each_number<kUnitPairs / kStepPairs>([&](auto step) MMQ_INLINE_LAMBDA {
        __m512i codes[kStepPairs][kTerms];
        unit.template enter<step>();
        unit.template decode<step, CODES>(codes);
        each_number<kStepPairs>([&](auto half) MMQ_INLINE_LAMBDA {
            constexpr int kPair = step * kStepPairs + half, kChain = kPair % PairSums<STREAMS>::kChains;
            each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
                each_number<kTerms>([&](auto t) MMQ_INLINE_LAMBDA {
                    __m512& sum = sums.of[s][kChain];
                    sum = dot(sum, codes[half][t], x + kPair * STREAMS + s);
                });
            });
        });
    });
}

// sums += columns [begin, end) of a tile times x, where a unit may be shared between groups: each takes it whole, with zeros
// for the other's columns.
template <int BITS, Codes CODES, int STREAMS>
MMQ_INLINE void multiply_ragged(const int32_t* words, const uint32_t* x, int64_t begin, int64_t end,
                                PairSums<STREAMS>& sums) {
    for (int64_t column = begin / kUnitColumns * kUnitColumns; column < end; column += kUnitColumns) {
        const uint32_t* from = x + column / 2 * STREAMS;
        alignas(64) uint32_t masked[kUnitPairs * STREAMS];
        if (column < begin || column + kUnitColumns > end) {
            mask_unit<STREAMS>(from, begin - column, end - column, masked);
            from = masked;
        }
        // The compiler is not told which it is: it would write the products out for both, and pick masked pairs out of
        // registers, at two shuffles each.
        asm("" : "+r"(from) : "m"(masked));
        multiply_unit<BITS, CODES>(words + column / kUnitColumns * (BITS * kTileRows), from, sums);
    }
}

// x [pairs][STREAMS] and its sums [segments][STREAMS], a tile -> y[STREAMS][16].
template <int BITS, int STREAMS, Codes CODES>
void multiply_tile(const Weight& w, const uint32_t* x, const float* x_sums, int64_t tile, float* y) {
    constexpr Codes kCodes = kCodesOfTile<BITS, STREAMS, CODES>;
    const int32_t* words = Tile<BITS>(w, tile).words;
    const TileGrids<BITS> grids(w, tile);
    std::fill_n(y, STREAMS * kTileRows, 0.0f);
    PairSums<STREAMS> sums;
    const auto end_segment = [&](int64_t group) MMQ_INLINE_LAMBDA {
        const Grid grid = grids.load(group, kCentre<BITS, kCodes>);
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            __m512 sum = sums.template total<s>();
            if (!grids.symmetric()) sum = fnma(grid.zero, set1(x_sums[s]), sum);
            float* to = y + s * kTileRows;
            store(to, fma(grid.scale, sum, load(to)));
        });
        x_sums += STREAMS;
    };
    if (w.groups == 1 || w.group_size % kUnitColumns == 0) {
        // Units follow upon each other, and little is done between segments: with one token it would show.
        const int64_t in_group = units_of(w.group_size);
        for (int64_t group = 0, left = units_of(w.k); left > 0; ++group) {
            int64_t units = std::min(left, in_group);
            left -= units;
            while (units > 0) {
                const int64_t now = std::min(units, kSegmentColumns / kUnitColumns);
                units -= now;
                sums.clear();
                const uint32_t* const end = x + now * kUnitPairs * STREAMS;
                for (; x != end; x += kUnitPairs * STREAMS, words += BITS * kTileRows)
                    multiply_unit<BITS, kCodes>(words, x, sums);
                end_segment(group);
            }
        }
        return;
    }
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) MMQ_INLINE_LAMBDA {
        sums.clear();
        // Whole grains: the order of pairs is not that of columns, and x is zero past k.
        multiply_ragged<BITS, kCodes>(words, x, begin, ceil_div(end, kGrainColumns) * kGrainColumns, sums);
        end_segment(group);
    });
}

// A unit of a panel meets many streams, so that memory has its time; words that wait are in the way of x in level 1.
constexpr int64_t kFetchAheadOfPanels = 1024;  // bytes

// The codes of a segment of some tiles, in whole units: [pairs][tiles][16].
struct Panel {
    alignas(64) uint32_t codes[(kSegmentColumns + kUnitColumns) / 2 * kPanelTiles * kTileRows];
    Grid grid[kPanelTiles];
};

template <int BITS, Codes CODES>
MMQ_INLINE void decode_unit(const int32_t* words, uint32_t* panel) {
    PairUnit<BITS> unit;
    unit.words = words;
    fetch<BITS>(words, kFetchAheadOfPanels);
    each_number<kUnitPairs / kStepPairs>([&](auto step) MMQ_INLINE_LAMBDA {
        __m512i codes[kStepPairs][1];
        unit.template enter<step>();
        unit.template decode<step, CODES>(codes);
        each_number<kStepPairs>([&](auto half) MMQ_INLINE_LAMBDA {
            _mm512_store_si512(panel, codes[half][0]);
            panel += kPanelTiles * kTileRows;
        });
    });
}

// y[STREAMS][tiles][16] += scale * (panel . x - zero * sums) for pairs from `first` on; sums null for a zero of nought
template <int STREAMS>
void multiply_panel(const Panel& panel, int64_t first, int64_t pairs, const uint32_t* x, const float* sums,
                    float* y) {
    __m512 acc[STREAMS][kPanelTiles];
    auto each_sum = [](auto body) MMQ_INLINE_LAMBDA {
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            each_number<kPanelTiles>([&](auto r) MMQ_INLINE_LAMBDA { body(s, r); });
        });
    };
    each_sum([&](auto s, auto r) MMQ_INLINE_LAMBDA { acc[s][r] = _mm512_setzero_ps(); });
    const uint32_t* codes = panel.codes + first * kPanelTiles * kTileRows;
    for (int64_t i = 0; i < pairs; ++i, codes += kPanelTiles * kTileRows, x += STREAMS) {
        __m512i code[kPanelTiles];
        each_number<kPanelTiles>(
            [&](auto r) MMQ_INLINE_LAMBDA { code[r] = _mm512_load_si512(codes + r * kTileRows); });
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            const __m512i both = _mm512_set1_epi32(static_cast<int>(x[s]));
            each_number<kPanelTiles>([&](auto r) MMQ_INLINE_LAMBDA {
                acc[s][r] = _mm512_dpbf16_ps(acc[s][r], (__m512bh)code[r], (__m512bh)both);
            });
        });
    }
    Grid grid[kPanelTiles];  // in registers: for all the compiler knows, y is where the panel has its own
    std::copy_n(panel.grid, kPanelTiles, grid);
    each_sum([&](auto s, auto r) MMQ_INLINE_LAMBDA {
        if (sums != nullptr) acc[s][r] = fnma(grid[r].zero, set1(sums[s]), acc[s][r]);
        float* to = y + (s * kPanelTiles + r) * kTileRows;
        store(to, fma(grid[r].scale, acc[s][r], load(to)));
    });
}

using MultiplyPanel = void (*)(const Panel&, int64_t, int64_t, const uint32_t*, const float*, float*);

// More than kMostStreams streams never make a group of less than 8.
constexpr MultiplyPanel kMultiplyPanel[] = {multiply_panel<8>, multiply_panel<10>, multiply_panel<12>};

using MultiplyTile = void (*)(const Weight&, const uint32_t*, const float*, int64_t, float*);

template <int BITS, Codes CODES>
MultiplyTile tile_kernel(int streams) {
    static constexpr MultiplyTile kQuads[kMostStreams / 4] = {
        multiply_tile<BITS, 4, CODES>, multiply_tile<BITS, 8, CODES>, multiply_tile<BITS, 12, CODES>,
        multiply_tile<BITS, 16, CODES>, multiply_tile<BITS, 20, CODES>};
    static constexpr MultiplyTile kFew[] = {multiply_tile<BITS, 1, CODES>, multiply_tile<BITS, 2, CODES>,
                                            multiply_tile<BITS, 3, CODES>};
    return streams < 4 ? kFew[streams - 1] : kQuads[streams / 4 - 1];
}

// --- entry ---

// Adds bias, activates and stores y[streams][TILES][16], of the tiles there are; the terms of a token are neighbours.
template <int TILES>
void store_block(const GemmArgs& args, const StreamBlock& block, int64_t first_tile, const float* y) {
    const int terms = terms_of(args.dtype);
    const int64_t tiles = std::min<int64_t>(TILES, tiles_of(args.weight.n) - first_tile);
    F16 bias[TILES];
    for (int64_t r = 0; r < tiles; ++r) bias[r] = load_bias(args, first_tile + r);
    for (int64_t s = 0; s < block.count; s += terms) {
        for (int64_t r = 0; r < tiles; ++r) {
            const float* from = y + (s * TILES + r) * kTileRows;
            F16 sum = load(from);
            for (int term = 1; term < terms; ++term) sum = add(sum, load(from + term * TILES * kTileRows));
            store_outputs(args, first_tile + r, (block.first + s) / terms, add(sum, bias[r]));
        }
    }
}

// A tile and all groups of a block, one after the other.
template <int BITS, Codes CODES>
void multiply_block(const GemmArgs& args, const StreamBlock& block, int64_t tile) {
    alignas(64) float y[kBlockStreams * kTileRows];
    for (int64_t g = 0; g < block.groups(); ++g)
        tile_kernel<BITS, CODES>(block.size(g))(args.weight, block.x_of(g), block.sums_of(g), tile,
                                                y + block.begin(g) * kTileRows);
    store_block<1>(args, block, tile, y);
}

// The tiles of a panel and all groups of a block, segment by segment. While a panel meets the groups, the next is decoded,
// some units after each group, so that words are read all along and not in bursts.
template <int BITS, Codes CODES>
void multiply_strip(const GemmArgs& args, const StreamBlock& block, int64_t first_tile) {
    const Weight& w = args.weight;
    int64_t tile[kPanelTiles];
    for (int r = 0; r < kPanelTiles; ++r)
        tile[r] = std::min(first_tile + r, tiles_of(w.n) - 1);     // the last may stand in for missing ones
    alignas(64) float y[kBlockStreams * kPanelTiles * kTileRows];  // [streams][tiles][16]
    std::fill_n(y, block.steps() * block.step * kPanelTiles * kTileRows, 0.0f);

    Panel panels[2];
    int64_t segment = -1, first = 0, pairs = 0;  // of the panel that meets groups
    const auto meet = [&](int64_t g) {
        const int64_t size = block.size(g);
        const float* sums = w.zero == nullptr ? nullptr : block.sums_of(g) + segment * size;
        kMultiplyPanel[size / 2 - 4](panels[segment % 2], first % kUnitPairs, pairs,
                                     block.x_of(g) + first * size, sums,
                                     y + block.begin(g) * kPanelTiles * kTileRows);
    };
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) {
        Panel& next = panels[(segment + 1) % 2];
        const int64_t first_unit = begin / kUnitColumns;
        const int64_t units = (units_of(end) - first_unit) * kPanelTiles;
        const auto decode = [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; ++i) {
                const int64_t unit = i / kPanelTiles, r = i % kPanelTiles;
                decode_unit<BITS, CODES>(
                    Tile<BITS>(w, tile[r]).words + (first_unit + unit) * (BITS * kTileRows),
                    next.codes + (unit * kUnitPairs * kPanelTiles + r) * kTileRows);
            }
        };
        if (segment < 0) {
            decode(0, units);
        } else {
            for (int64_t g = 0, groups = block.groups(); g < groups; ++g) {
                meet(g);
                decode(units * g / groups, units * (g + 1) / groups);
            }
        }
        for (int r = 0; r < kPanelTiles; ++r)
            next.grid[r] = TileGrids<BITS>(w, tile[r]).load(group, kCentre<BITS, CODES>);
        ++segment;
        first = begin / 2;
        pairs = ceil_div(end - begin, kGrainColumns) * kGrainPairs;
    });
    for (int64_t g = 0; g < block.groups(); ++g) meet(g);
    store_block<kPanelTiles>(args, block, first_tile, y);
}

template <int BITS, Codes CODES>
void gemm_codes(const GemmArgs& args) {
    const Weight& w = args.weight;
    const int threads = useful_threads(args);
    const int64_t streams = args.m * terms_of(args.dtype), tiles = tiles_of(w.n);
    if (streams == 0) return;
    StreamBlock block = {};
    block.pairs = units_of(w.k) * kUnitPairs;
    block.segments = count_segments(w);
    // Panels are for many tokens, where every thread has several of them. Blocks are of almost equal size: each of several
    // has more streams than have chains of sums, and threads change no bit.
    const bool panels = streams > kMostStreams && tiles >= 2 * threads * kPanelTiles;
    const int64_t quads = ceil_div(streams, 4), blocks = ceil_div(streams, kBlockStreams);
    const int64_t most = ceil_div(quads, blocks) * 4;
    block.most = panels ? kPanelStreams : kMostStreams;
    block.step = panels ? 2 : streams > 3 ? 4 : streams;
    const AlignedFloats x(most * block.pairs), sums(most * block.segments);
    block.x = reinterpret_cast<uint32_t*>(x.data());
    block.sums = sums.data();
    for (int64_t i = 0; i < blocks; ++i) {
        block.first = quads * i / blocks * 4;
        block.count = std::min(streams, quads * (i + 1) / blocks * 4) - block.first;
        load_block(args, block, threads);
        if (panels) {
            parallel_for(threads, ceil_div(tiles, kPanelTiles),
                         ceil_div(tiles_in_a_run(args, threads), kPanelTiles),
                         [&](int64_t i) { multiply_strip<BITS, CODES>(args, block, i * kPanelTiles); });
        } else {
            parallel_for(threads, tiles, tiles_in_a_run(args, threads),
                         [&](int64_t tile) { multiply_block<BITS, CODES>(args, block, tile); });
        }
    }
}

template <int BITS>
void gemm_bits(const GemmArgs& args) {
    if constexpr (BITS == 7) {
        // Where something is taken away anyway, and 16 bits of an output have no use for the last of 24.
        if (args.dtype == Dtype::kBFloat16 && args.weight.zero != nullptr)
            return gemm_codes<BITS, Codes::kOffset>(args);
    }
    gemm_codes<BITS, Codes::kCentred>(args);
}
