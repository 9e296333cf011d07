// y[m, n] = activation(x[m, k] W[n, k]^T + bias[n]) for x, bias, y in bf16 or fp16, by vdpbf16ps
// W = scale * (q - zero), in the cpu layout (common/layout.h)
//
// Codes centred on c = 2^(bits-1) are integers that bf16 holds exactly; so does it x in bf16, and x in fp16 as the sum of
// two terms. So products are exact, they are added up in fp32, and the weight is never rounded. A **stream** is one term of
// one token, and the kernels know only streams: fp16 is twice as many, added up at the end. Included inside an anonymous
// namespace after pairs_avx512.h and outputs.inl. For each segment (at most 256 columns of one group):
//
//     y[s] += scale * (sum of x[s][k] * (q[k] - c)  -  (zero - c) * sum of x[s][k])
//
// Few streams (up to 4), `multiply_tiles`: one pass over the words, fetched 8 KB ahead; a register of 32 codes meets all
// streams at once. Four streams meet two tiles at a time, so that a load of x serves two products.
//
// Many streams, `multiply_strip`: the codes of a segment of four tiles become a panel of bf16 pairs (32 KB, level 1), which
// meets the streams six at a time. 4 x 6 accumulators hide the six cycles of vdpbf16ps, 10 loads feed 24 of them, and the
// words of the next segment are fetched while this one is decoded:
//
//             streams of a block ->                          panel: [pairs][4 tiles][16 rows] of two codes
//      W    +------+------+------+                           x:     [pairs][6 streams] of two values
//    4 tiles| 4x6  |      |      |  level 2                  for pair: acc[r][s] += panel[pair][r] . x[pair][s]
//           +------+------+------+

constexpr int kFewStreams = 4;
constexpr int kStripTiles = 4;
constexpr int kStreams = 6;             // of a register block
constexpr int64_t kBlockStreams = 264;  // y of a strip takes 66 KB
constexpr int kUnitPairs = kUnitColumns / 2;
constexpr int kGrainPairs = kGrainColumns / 2;

static_assert(kBlockStreams % 2 == 0, "the two terms of a token are in one block");

inline __m512 dot(__m512 sum, __m512i codes, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)codes, (__m512bh)x);
}

inline __m512i both(uint32_t pair) {
    return _mm512_set1_epi32(static_cast<int>(pair));
}

// The same with a pair from memory, in one instruction: GCC 12 makes two of it.
inline __m512 dot_from(__m512 sum, __m512i codes, const uint32_t* pair) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*pair));
    return sum;
}

// --- x as streams of pairs ---

// Tokens in order of pairs: per step of four columns (0, 2), (1, 3), what a half step of a unit holds.
struct PairOrder {
    alignas(64) uint16_t index[32] = {};

    constexpr PairOrder() {
        constexpr int kOrder[4] = {0, 2, 1, 3};
        for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i / 4 * 4 + kOrder[i % 4]);
    }
};

inline constexpr PairOrder kPairOrder{};

inline int terms_of(Dtype dtype) {
    return dtype == Dtype::kFloat16 ? 2 : 1;
}

inline __m512i top_halves(__m512 low, __m512 high) {
    const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
    const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// What truncation to bf16 leaves of x: exact, as fp16 has 11 bits and bf16 keeps 8. Nothing of infinities.
inline __m512 rest(__m512 x) {
    const __m512 top = _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    const __mmask16 special = _mm512_fpclass_ps_mask(x, 0x99);  // infinities and NaNs
    return _mm512_maskz_sub_ps(static_cast<__mmask16>(~special), x, top);
}

// Stream s of x -> [units * 16] pairs, zeros past k.
void load_stream(const GemmArgs& args, int64_t s, uint32_t* pairs) {
    const int64_t k = args.weight.k, terms = terms_of(args.dtype);
    const uint16_t* row = static_cast<const uint16_t*>(args.x) + s / terms * k;
    const __m512i order = _mm512_load_si512(kPairOrder.index);
    for (int64_t column = 0; column < k; column += kUnitColumns, pairs += kUnitPairs) {
        const int64_t left = std::min<int64_t>(kUnitColumns, k - column);
        const __mmask32 mask = static_cast<__mmask32>(0xffffffffu >> (kUnitColumns - left));
        __m512i values = _mm512_maskz_loadu_epi16(mask, row + column);
        if (terms == 2) {
            __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(values));
            __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(values, 1));
            if (s % 2 == 1) low = rest(low), high = rest(high);
            values = top_halves(low, high);
        }
        _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(order, values));
    }
}

// Sum of a stream over a segment; in fp64, as it may cancel.
inline float sum_pairs(const uint32_t* pairs, int64_t begin, int64_t end) {
    __m256d sum = _mm256_setzero_pd();
    for (int64_t i = begin / 2; i < end / 2 + end % 2; i += kGrainPairs) {
        const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs + i));
        const __m128i top = _mm_set1_epi32(static_cast<int>(0xffff0000u));
        sum = _mm256_add_pd(sum, _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(four, 16))));
        sum = _mm256_add_pd(sum, _mm256_cvtps_pd(_mm_castsi128_ps(_mm_and_si128(four, top))));
    }
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
    return static_cast<float>(_mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two)));
}

// A block of streams in groups of almost equal size: group g holds streams [begin(g), begin(g + 1)) of it, its pairs stand
// at x + begin(g) * pairs as [pairs][its streams], its sums at sums + begin(g) * segments as [segments][its streams].
struct StreamBlock {
    int64_t first, count, groups, pairs, segments;
    uint32_t* x;
    float* sums;

    int64_t begin(int64_t group) const { return count * group / groups; }
    int size(int64_t group) const { return static_cast<int>(begin(group + 1) - begin(group)); }
};

// Streams past the last token are zeros: cheaper than kernels for every number.
void load_group(const GemmArgs& args, const StreamBlock& block, int64_t group, uint32_t* row) {
    const int64_t begin = block.begin(group), size = block.size(group);
    uint32_t* x = block.x + begin * block.pairs;
    for (int64_t s = 0; s < size; ++s) {
        const int64_t stream = block.first + begin + s;
        if (stream < args.m * terms_of(args.dtype)) {
            load_stream(args, stream, row);
        } else {
            std::fill_n(row, block.pairs, 0u);
        }
        for (int64_t i = 0; i < block.pairs; ++i) x[i * size + s] = row[i];
        if (args.weight.zero == nullptr) continue;
        float* sums = block.sums + begin * block.segments + s;
        each_segment(args.weight, [&](int64_t first, int64_t end, int64_t) {
            *sums = sum_pairs(row, first, end);
            sums += size;
        });
    }
}

// Activates and stores y of a tile; the streams of a token lie `stride` apart.
inline void store_token(const GemmArgs& args, int64_t tile, int64_t token, const float* y, int64_t stride,
                        int terms, __m512 bias) {
    __m512 sum = load(y);
    if (terms == 2) sum = add(sum, load(y + stride));
    store_outputs(args, tile, token, add(sum, bias));
}

// --- few streams ---

// Tiles that streams meet at a time: two share the loads of x, one is a single run through memory.
constexpr int tiles_at_once(int streams) {
    return streams >= 4 ? 2 : 1;
}

// The pairs of a unit, [16][STREAMS], with zeros outside columns [begin, end) of it. By registers: GCC 12 vectorizes the
// loop over pairs into stores that leave parts of `masked` unwritten.
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

// vdpbf16ps takes 6 cycles: with few streams, pairs take turns between chains of sums.
template <int STREAMS, int TILES>
struct PairSums {
    static constexpr int kChains = STREAMS == 4 ? 2 : STREAMS == 2 ? 4 : 8;
    __m512 of[STREAMS][TILES][kChains];

    MMQ_INLINE void clear() {
        each_sum([&](auto s, auto r) MMQ_INLINE_LAMBDA {
            each_number<kChains>([&](auto c) MMQ_INLINE_LAMBDA { of[s][r][c] = _mm512_setzero_ps(); });
        });
    }

    template <class Body>
    static MMQ_INLINE void each_sum(const Body& body) {
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            each_number<TILES>([&](auto r) MMQ_INLINE_LAMBDA { body(s, r); });
        });
    }

    // The chains of a stream and a tile added up, neighbours first.
    template <int S, int R, int FIRST = 0, int COUNT = kChains>
    MMQ_INLINE __m512 total() const {
        if constexpr (COUNT == 1) {
            return of[S][R][FIRST];
        } else {
            return add(total<S, R, FIRST, COUNT / 2>(), total<S, R, FIRST + COUNT / 2, COUNT / 2>());
        }
    }
};

// sums += the unit at `words` of each tile, times the pairs of x.
template <int BITS, int STREAMS, int TILES>
MMQ_INLINE void multiply_unit(const int32_t* const (&words)[TILES], const uint32_t* x,
                              PairSums<STREAMS, TILES>& sums) {
    PairUnit<BITS> units[TILES];
    each_number<TILES>([&](auto r) MMQ_INLINE_LAMBDA {
        units[r].words = words[r];
        fetch_unit<BITS>(words[r]);
    });
    each_number<kUnitPairs>([&](auto i) MMQ_INLINE_LAMBDA {
        constexpr int kStep = i / 2, kHalf = i % 2, kChain = i % PairSums<STREAMS, TILES>::kChains;
        __m512i codes[TILES][kTerms<BITS>];
        each_number<TILES>([&](auto r) MMQ_INLINE_LAMBDA {
            if constexpr (kHalf == 0) units[r].template enter<kStep>();
            each_number<kTerms<BITS>>([&](auto t) MMQ_INLINE_LAMBDA {
                codes[r][t] = units[r].template term<kStep, kHalf, t>();
            });
        });
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            each_number<TILES>([&](auto r) MMQ_INLINE_LAMBDA {
                each_number<kTerms<BITS>>([&](auto t) MMQ_INLINE_LAMBDA {
                    __m512& sum = sums.of[s][r][kChain];
                    sum = dot_from(sum, codes[r][t], x + i * STREAMS + s);
                });
            });
        });
    });
}

// x [pairs][STREAMS], sums of x [segments][STREAMS], TILES tiles -> y[STREAMS][TILES][16].
template <int BITS, int STREAMS, int TILES>
void multiply_tiles(const Weight& w, const uint32_t* streams, const float* x_sums,
                    const int64_t (&tiles)[TILES], float* y) {
    __m512 total[STREAMS][TILES];
    const int32_t* first[TILES];
    each_number<TILES>([&](auto r) MMQ_INLINE_LAMBDA { first[r] = Tile<BITS>(w, tiles[r]).words; });
    PairSums<STREAMS, TILES>::each_sum([&](auto s, auto r) MMQ_INLINE_LAMBDA { total[s][r] = set1(0.0f); });
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) MMQ_INLINE_LAMBDA {
        PairSums<STREAMS, TILES> sums;
        sums.clear();
        const int64_t stop = end == w.k ? units_of(w.k) * kUnitColumns : end;  // x is zero past k
        for (int64_t column = begin / kUnitColumns * kUnitColumns; column < stop; column += kUnitColumns) {
            const uint32_t* x = streams + column / 2 * STREAMS;
            alignas(64) uint32_t masked[kUnitPairs * STREAMS];
            if (column < begin || column + kUnitColumns > stop) {
                // A unit that groups share: each takes it whole, with zeros for the other's columns.
                mask_unit<STREAMS>(x, begin - column, stop - column, masked);
                x = masked;
                asm("" : "+r"(x) : "m"(masked));  // else GCC picks pairs out of registers, at two shuffles each
            }
            const int32_t* words[TILES];
            each_number<TILES>([&](auto r) MMQ_INLINE_LAMBDA {
                words[r] = first[r] + column / kUnitColumns * (BITS * kTileRows);
            });
            multiply_unit<BITS, STREAMS, TILES>(words, x, sums);
        }
        each_number<TILES>([&](auto r) MMQ_INLINE_LAMBDA {
            const Grid grid = load_grid<BITS>(w, tiles[r], group);
            each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
                __m512 sum = sums.template total<s, r>();
                if (w.zero != nullptr) sum = fnma(grid.zero, set1(x_sums[s]), sum);
                total[s][r] = fma(grid.scale, sum, total[s][r]);
            });
        });
        x_sums += STREAMS;
    });
    PairSums<STREAMS, TILES>::each_sum(
        [&](auto s, auto r) MMQ_INLINE_LAMBDA { store(y + (s * TILES + r) * kTileRows, total[s][r]); });
}

template <int BITS, int STREAMS>
void gemm_few(const GemmArgs& args) {
    constexpr int kTiles = tiles_at_once(STREAMS);
    const Weight& w = args.weight;
    // What one term cannot be is known here: the compiler then sees no second stream of one.
    const int terms = STREAMS == 1 ? 1 : terms_of(args.dtype);
    StreamBlock block = {};
    block.groups = 1;
    block.count = STREAMS;
    block.pairs = units_of(w.k) * kUnitPairs;
    block.segments = count_segments(w);
    const AlignedFloats x((STREAMS + 1) * block.pairs), sums(STREAMS * block.segments);
    block.x = reinterpret_cast<uint32_t*>(x.data());
    block.sums = sums.data();
    load_group(args, block, 0, block.x + STREAMS * block.pairs);
    const int threads = useful_threads(args);
    const int64_t tiles = tiles_of(w.n), count = ceil_div(tiles, kTiles);
    parallel_for(threads, count, ceil_div(tiles_in_a_run(args, threads), kTiles), [&](int64_t index) {
        // The last tile stands in for the one behind it, where two are taken and their number is odd.
        int64_t taken[kTiles];
        for (int r = 0; r < kTiles; ++r) taken[r] = std::min(index * kTiles + r, tiles - 1);
        alignas(64) float y[STREAMS * kTiles * kTileRows];
        multiply_tiles<BITS, STREAMS, kTiles>(w, block.x, block.sums, taken, y);
        for (int r = 0; r < kTiles && index * kTiles + r < tiles; ++r) {
            const F16 bias = load_bias(args, taken[r]);
            for (int64_t token = 0; token < args.m; ++token) {
                const float* from = y + (token * terms * kTiles + r) * kTileRows;
                store_token(args, taken[r], token, from, kTiles * kTileRows, terms, bias);
            }
        }
    });
}

// --- many streams ---

// One segment of TILES tiles, in whole units.
template <int TILES>
struct Panel {
    alignas(64) uint32_t codes[(kSegmentColumns + kUnitColumns) / 2 * TILES * kTileRows];
    alignas(64) float scale[TILES * kTileRows], zero[TILES * kTileRows];
};

// y[STREAMS][TILES][16] += scale * (panel . x - zero * sum of x), pairs [first, first + pairs) of the panel
template <int TILES, int STREAMS>
void multiply_panel(const Panel<TILES>& panel, int64_t first, int64_t pairs, const uint32_t* x,
                    const float* sums, float* y) {
    __m512 acc[STREAMS][TILES];
#pragma GCC unroll 8
    for (int s = 0; s < STREAMS; ++s) {
#pragma GCC unroll 4
        for (int r = 0; r < TILES; ++r) acc[s][r] = _mm512_setzero_ps();
    }
    const uint32_t* codes = panel.codes + first * TILES * kTileRows;
    for (int64_t pair = 0; pair < pairs; ++pair, codes += TILES * kTileRows, x += STREAMS) {
        __m512i w[TILES];
#pragma GCC unroll 4
        for (int r = 0; r < TILES; ++r) w[r] = _mm512_load_si512(codes + r * kTileRows);
#pragma GCC unroll 8
        for (int s = 0; s < STREAMS; ++s) {
            const __m512i both_x = both(x[s]);
#pragma GCC unroll 4
            for (int r = 0; r < TILES; ++r) acc[s][r] = dot(acc[s][r], w[r], both_x);
        }
    }
#pragma GCC unroll 8
    for (int s = 0; s < STREAMS; ++s) {
#pragma GCC unroll 4
        for (int r = 0; r < TILES; ++r) {
            if (sums != nullptr) acc[s][r] = fnma(load(panel.zero + r * kTileRows), set1(sums[s]), acc[s][r]);
            float* to = y + (s * TILES + r) * kTileRows;
            store(to, fma(load(panel.scale + r * kTileRows), acc[s][r], load(to)));
        }
    }
}

template <int TILES>
using MultiplyPanel = void (*)(const Panel<TILES>&, int64_t, int64_t, const uint32_t*, const float*, float*);

template <int TILES>
constexpr MultiplyPanel<TILES> kMultiplyPanel[kStreams] = {
    multiply_panel<TILES, 1>, multiply_panel<TILES, 2>, multiply_panel<TILES, 3>,
    multiply_panel<TILES, 4>, multiply_panel<TILES, 5>, multiply_panel<TILES, 6>};

// The units of columns [begin, end) of one tile -> its part of a panel.
template <int BITS, int TILES>
void decode_pairs(const Weight& w, int64_t tile_index, int64_t begin, int64_t end, uint32_t* panel) {
    const int64_t first = begin / kUnitColumns, last = units_of(end);
    const int32_t* words = Tile<BITS>(w, tile_index).words;
    for (int64_t index = first; index < last; ++index) {
        PairUnit<BITS> unit;
        unit.words = words + index * (BITS * kTileRows);
        fetch_unit<BITS>(unit.words, (last - first) * (BITS * kTileRows));  // of the next segment
        each_number<kUnitColumns / kStepColumns>([&](auto step) MMQ_INLINE_LAMBDA {
            __m512i pairs[2];
            unit.template enter<step>();
            unit.template single<step>(pairs);
            _mm512_store_si512(panel, pairs[0]);
            _mm512_store_si512(panel + TILES * kTileRows, pairs[1]);
            panel += 2 * TILES * kTileRows;
        });
    }
}

template <int BITS, int TILES>
void multiply_strip(const GemmArgs& args, const StreamBlock& block, int64_t first_tile) {
    Panel<TILES> panel;
    alignas(64) float y[kBlockStreams * TILES * kTileRows];
    std::fill_n(y, block.count * TILES * kTileRows, 0.0f);
    const Weight& w = args.weight;
    int64_t segment = 0;
    each_segment(w, [&](int64_t begin, int64_t end, int64_t group) {
        for (int r = 0; r < TILES; ++r) {
            decode_pairs<BITS, TILES>(w, first_tile + r, begin, end, panel.codes + r * kTileRows);
            const Grid grid = load_grid<BITS>(w, first_tile + r, group);
            store(panel.scale + r * kTileRows, grid.scale);
            store(panel.zero + r * kTileRows, grid.zero);
        }
        const int64_t pairs = ceil_div(end - begin, kGrainColumns) * kGrainPairs;
        for (int64_t g = 0; g < block.groups; ++g) {
            const int64_t first = block.begin(g), size = block.size(g);
            const uint32_t* x = block.x + first * block.pairs + begin / 2 * size;
            const float* sums =
                w.zero == nullptr ? nullptr : block.sums + first * block.segments + segment * size;
            kMultiplyPanel<TILES>[size - 1](panel, begin % kUnitColumns / 2, pairs, x, sums,
                                            y + first* TILES* kTileRows);
        }
        ++segment;
    });
    const int terms = terms_of(args.dtype);
    for (int r = 0; r < TILES; ++r) {
        const F16 bias = load_bias(args, first_tile + r);
        for (int64_t s = 0; s < block.count; s += terms) {
            store_token(args, first_tile + r, (block.first + s) / terms, y + (s * TILES + r) * kTileRows,
                        TILES * kTileRows, terms, bias);
        }
    }
}

template <int BITS>
void gemm_many(const GemmArgs& args) {
    const Weight& w = args.weight;
    const int threads = useful_threads(args), terms = terms_of(args.dtype);
    const int64_t tiles = tiles_of(w.n);
    // Blocks of almost equal size; strips of four tiles where every thread has several of them.
    const int64_t blocks = ceil_div(args.m * terms, kBlockStreams);
    const int64_t block_tokens = ceil_div(args.m, blocks);
    const bool wide = tiles >= 2 * threads * kStripTiles;
    StreamBlock block = {};
    block.pairs = units_of(w.k) * kUnitPairs;
    block.segments = count_segments(w);
    const AlignedFloats x(block_tokens * terms * block.pairs), sums(block_tokens * terms * block.segments);
    const AlignedFloats rows(threads * block.pairs);
    block.x = reinterpret_cast<uint32_t*>(x.data());
    block.sums = sums.data();
    for (int64_t first = 0; first < args.m; first += block_tokens) {
        block.first = first * terms;
        block.count = std::min(block_tokens, args.m - first) * terms;
        block.groups = ceil_div(block.count, kStreams);
        parallel_for(threads, threads, 1, [&](int64_t i) {
            uint32_t* row = reinterpret_cast<uint32_t*>(rows.data()) + i * block.pairs;
            for (int64_t g = block.groups * i / threads; g < block.groups * (i + 1) / threads; ++g)
                load_group(args, block, g, row);
        });
        const int64_t strips = wide ? tiles / kStripTiles : 0, rest = tiles - strips * kStripTiles;
        parallel_for(threads, strips + rest, 1, [&](int64_t i) {
            if (i < strips) return multiply_strip<BITS, kStripTiles>(args, block, i * kStripTiles);
            multiply_strip<BITS, 1>(args, block, strips * kStripTiles + i - strips);
        });
    }
}

// --- entry ---

template <int BITS>
void gemm_bits(const GemmArgs& args) {
    const int64_t streams = args.m * terms_of(args.dtype);
    if (streams > kFewStreams) return gemm_many<BITS>(args);
    if (streams > 2) return gemm_few<BITS, 4>(args);
    if (streams > 1) return gemm_few<BITS, 2>(args);
    if (streams > 0) return gemm_few<BITS, 1>(args);
}
