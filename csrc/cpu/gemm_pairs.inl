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

// sum + the products of 16 rows of codes with a pair of x in all lanes.
MMQ_INLINE __m512 dot(__m512 sum, __m512i codes, __m512i pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)codes, (__m512bh)pair);
}

MMQ_INLINE __m512i broadcast(const uint32_t* pair) {
    return _mm512_set1_epi32(static_cast<int>(*pair));
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

// With few streams there are registers for the tables of wider windows.
template <int BITS, int STREAMS>
constexpr int kWindowOfTile = BITS == 3 && STREAMS <= 2 ? 6 : kWindow<BITS>;

// sums += the unit at `words` times the pairs of x.
template <int BITS, Codes CODES, int STREAMS>
MMQ_INLINE void multiply_unit(const int32_t* words, const uint32_t* x, PairSums<STREAMS>& sums) {
    constexpr int kTerms = CODES == Codes::kTerms ? 2 : 1;
    PairUnit<BITS, kWindowOfTile<BITS, STREAMS>> unit;
    unit.words = words;
    fetch_unit<BITS>(words);
    each_number<kUnitPairs / kStepPairs>([&](auto step) MMQ_INLINE_LAMBDA {
        __m512i codes[kStepPairs][kTerms];
        unit.template enter<step>();
        unit.template decode<step, CODES>(codes);
        each_number<kStepPairs>([&](auto half) MMQ_INLINE_LAMBDA {
            constexpr int kPair = step * kStepPairs + half, kChain = kPair % PairSums<STREAMS>::kChains;
            each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
                const __m512i pair = broadcast(x + kPair * STREAMS + s);
                each_number<kTerms>([&](auto t) MMQ_INLINE_LAMBDA {
                    sums.of[s][kChain] = dot(sums.of[s][kChain], codes[half][t], pair);
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

// Makes the next panel while one is multiplied, a step of a tile at a time: decoding and products run on different ports of a
// CPU, but only what stands close to each other in the program is under way at once.
template <int BITS, Codes CODES>
class PanelDecoder {
  public:
    PanelDecoder(const Weight& w, const int64_t (&tile)[kPanelTiles]) {
        for (int r = 0; r < kPanelTiles; ++r) words_[r] = Tile<BITS>(w, tile[r]).words;
    }

    // The units that hold columns [begin, end) are to come.
    void start(int64_t begin, int64_t end, Panel& panel) {
        first_unit_ = begin / kUnitColumns;
        codes_ = panel.codes;
        at_ = 0;
        end_ = static_cast<uint64_t>(units_of(end) - first_unit_) * kPanelTiles * kSteps;
    }

    // Makes the next step, if there is one.
    MMQ_INLINE void step() {
        if (at_ == end_) return;
        const uint64_t unit = at_ / (kPanelTiles * kSteps), r = at_ / kSteps % kPanelTiles;
        const int32_t* words = words_[r] + (first_unit_ + static_cast<int64_t>(unit)) * (BITS * kTileRows);
        uint32_t* codes = codes_ + (unit * kUnitPairs * kPanelTiles + r) * kTileRows;
        switch (at_++ % kSteps) {
            case 0:
                fetch<BITS>(words, kFetchAheadOfPanels);
                return decode<0>(words, codes);
            case 1:
                return decode<1>(words, codes);
            case 2:
                return decode<2>(words, codes);
            case 3:
                return decode<3>(words, codes);
            case 4:
                return decode<4>(words, codes);
            case 5:
                return decode<5>(words, codes);
            case 6:
                return decode<6>(words, codes);
            default:
                return decode<7>(words, codes);
        }
    }

    void finish() {
        while (at_ != end_) step();
    }

  private:
    static constexpr uint64_t kSteps = kUnitColumns / kStepColumns;
    static_assert(kSteps == 8, "a case for each");

    template <int STEP>
    static MMQ_INLINE void decode(const int32_t* words, uint32_t* codes) {
        PairUnit<BITS> unit;
        unit.words = words;
        __m512i pairs[kStepPairs][1];
        unit.template enter<STEP, /*ALONE=*/true>();
        unit.template decode<STEP, CODES>(pairs);
        each_number<kStepPairs>([&](auto half) MMQ_INLINE_LAMBDA {
            _mm512_store_si512(codes + (STEP * kStepPairs + half) * kPanelTiles * kTileRows, pairs[half][0]);
        });
    }

    const int32_t* words_[kPanelTiles];
    int64_t first_unit_ = 0;
    uint32_t* codes_ = nullptr;  // [units][pairs of a unit][tiles][16]
    uint64_t at_ = 0, end_ = 0;  // steps, of which [units][tiles][kSteps] are a panel
};

// y[STREAMS][tiles][16] += scale * (panel . x - zero * sums) for pairs from `first` on; sums null for a zero of nought. After
// every so many pairs, a step of the next panel.
template <int BITS, Codes CODES, int STREAMS>
void multiply_panel(const Panel& panel, int64_t first, int64_t pairs, const uint32_t* x, const float* sums,
                    float* y, PanelDecoder<BITS, CODES>& next, int64_t pairs_per_step) {
    __m512 acc[STREAMS][kPanelTiles];
    auto each_sum = [](auto body) MMQ_INLINE_LAMBDA {
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            each_number<kPanelTiles>([&](auto r) MMQ_INLINE_LAMBDA { body(s, r); });
        });
    };
    each_sum([&](auto s, auto r) MMQ_INLINE_LAMBDA { acc[s][r] = _mm512_setzero_ps(); });
    const uint32_t* codes = panel.codes + first * kPanelTiles * kTileRows;
    const auto multiply_pair = [&]() MMQ_INLINE_LAMBDA {
        __m512i code[kPanelTiles];
        each_number<kPanelTiles>(
            [&](auto r) MMQ_INLINE_LAMBDA { code[r] = _mm512_load_si512(codes + r * kTileRows); });
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            const __m512i pair = broadcast(x + s);
            each_number<kPanelTiles>([&](auto r)
                                         MMQ_INLINE_LAMBDA { acc[s][r] = dot(acc[s][r], code[r], pair); });
        });
        codes += kPanelTiles * kTileRows;
        x += STREAMS;
    };
    while (pairs > 0) {
        const int64_t now = std::min(pairs, pairs_per_step);
        pairs -= now;
        for (int64_t i = 0; i < now; ++i) multiply_pair();
        next.step();
    }
    Grid grid[kPanelTiles];  // in registers: for all the compiler knows, y is where the panel has its own
    std::copy_n(panel.grid, kPanelTiles, grid);
    each_sum([&](auto s, auto r) MMQ_INLINE_LAMBDA {
        if (sums != nullptr) acc[s][r] = fnma(grid[r].zero, set1(sums[s]), acc[s][r]);
        float* to = y + (s * kPanelTiles + r) * kTileRows;
        store(to, fma(grid[r].scale, acc[s][r], load(to)));
    });
}

template <int BITS, Codes CODES>
using MultiplyPanel = void (*)(const Panel&, int64_t, int64_t, const uint32_t*, const float*, float*,
                               PanelDecoder<BITS, CODES>&, int64_t);

template <int BITS, Codes CODES>
MultiplyPanel<BITS, CODES> panel_kernel(int streams) {
    // More than kMostStreams streams never make a group of less than 8.
    static constexpr MultiplyPanel<BITS, CODES> kKernels[] = {
        multiply_panel<BITS, CODES, 8>, multiply_panel<BITS, CODES, 10>, multiply_panel<BITS, CODES, 12>};
    return kKernels[streams / 2 - 4];
}

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

// The tiles of a panel and all groups of a block, segment by segment: while a panel meets the groups, the next is made.
template <int BITS, Codes CODES>
void multiply_strip(const GemmArgs& args, const StreamBlock& block, int64_t first_tile) {
    const Weight& w = args.weight;
    int64_t tile[kPanelTiles];
    for (int r = 0; r < kPanelTiles; ++r)
        tile[r] = std::min(first_tile + r, tiles_of(w.n) - 1);     // the last may stand in for missing ones
    alignas(64) float y[kBlockStreams * kPanelTiles * kTileRows];  // [streams][tiles][16]
    std::fill_n(y, block.steps() * block.step * kPanelTiles * kTileRows, 0.0f);

    Panel panels[2];
    PanelDecoder<BITS, CODES> decoder(w, tile);
    int64_t segment = -1, first = 0, pairs = 0;  // of the panel that meets groups
    const auto meet_groups = [&]() {
        for (int64_t g = 0; g < block.groups(); ++g) {
            const int size = block.size(g);
            const MultiplyPanel<BITS, CODES> multiply = panel_kernel<BITS, CODES>(size);
            const uint32_t* x = block.x_of(g) + first * size;
            const float* sums = w.zero == nullptr ? nullptr : block.sums_of(g) + segment * size;
            float* out = y + block.begin(g) * kPanelTiles * kTileRows;
            multiply(panels[segment % 2], first % kUnitPairs, pairs, x, sums, out, decoder, block.groups());
        }
    };
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) {
        Panel& next = panels[(segment + 1) % 2];
        decoder.start(begin, end, next);
        if (segment >= 0) meet_groups();
        decoder.finish();
        for (int r = 0; r < kPanelTiles; ++r)
            next.grid[r] = TileGrids<BITS>(w, tile[r]).load(group, kCentre<BITS, CODES>);
        ++segment;
        first = begin / 2;
        pairs = ceil_div(end - begin, kGrainColumns) * kGrainPairs;
    });
    meet_groups();
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
