// x as streams of bf16 pairs, which vdpbf16ps multiplies with those of pairs_avx512.h: a stream is one term of one token.
// Streams are laid out by groups that a kernel takes at once, a pair of each side by side. Included inside an anonymous
// namespace, before gemm_pairs.inl and after outputs.inl.

constexpr int kUnitPairs = kUnitColumns / 2;
constexpr int kGrainPairs = kGrainColumns / 2;
constexpr int kStepPairs = kStepColumns / 2;

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
    if (dtype == Dtype::kBFloat16) return 1;
    return dtype == Dtype::kFloat16 ? 2 : 3;
}

inline __m512i top_halves(__m512 low, __m512 high) {
    const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
    const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// What truncation to bf16 leaves of x: exact, and no bits at all after as many terms as there are, as bf16 keeps 8 of fp16's
// 11 and fp32's 24. Nothing of infinities.
inline __m512 rest(__m512 x) {
    const __m512 top = _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    const __mmask16 special = _mm512_fpclass_ps_mask(x, 0x99);  // infinities and NaNs
    return _mm512_maskz_sub_ps(static_cast<__mmask16>(~special), x, top);
}

// Term `term` of 32 columns.
inline __m512i term_of(__m512 low, __m512 high, int64_t term) {
    for (int64_t i = 0; i < term; ++i) low = rest(low), high = rest(high);
    return top_halves(low, high);
}

// `count` columns of stream s of x from one on, at most 32, zeros after them.
inline __m512i load_columns(const GemmArgs& args, int64_t s, int64_t column, int64_t count) {
    const int64_t terms = terms_of(args.dtype), at = s / terms * args.weight.k + column;
    const __mmask32 mask = static_cast<__mmask32>(0xffffffffu >> (kUnitColumns - count));
    if (terms == 3) {
        const float* from = static_cast<const float*>(args.x) + at;
        const __mmask16 first = static_cast<__mmask16>(mask), second = static_cast<__mmask16>(mask >> 16);
        return term_of(_mm512_maskz_loadu_ps(first, from), _mm512_maskz_loadu_ps(second, from + 16), s % 3);
    }
    const __m512i values = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(args.x) + at);
    if (terms == 1) return values;
    return term_of(_mm512_cvtph_ps(_mm512_castsi512_si256(values)),
                   _mm512_cvtph_ps(_mm512_extracti64x4_epi64(values, 1)), s % 2);
}

// Unit `unit` of stream s of x as 16 pairs, zeros past k.
inline __m512i load_pairs(const GemmArgs& args, int64_t s, int64_t unit) {
    const int64_t column = unit * kUnitColumns, left = args.weight.k - column;
    return _mm512_permutexvar_epi16(_mm512_load_si512(kPairOrder.index),
                                    load_columns(args, s, column, std::min<int64_t>(kUnitColumns, left)));
}

// The sum of columns [begin, end) of stream s, in fp64, as they may cancel.
inline float sum_columns(const GemmArgs& args, int64_t s, int64_t begin, int64_t end) {
    __m512d total[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    const auto add_halves = [&](__m512i floats) {
        total[0] =
            _mm512_add_pd(total[0], _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_castsi512_si256(floats))));
        total[1] = _mm512_add_pd(total[1],
                                 _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_extracti64x4_epi64(floats, 1))));
    };
    for (int64_t column = begin; column < end; column += kUnitColumns) {
        const __m512i values = load_columns(args, s, column, std::min<int64_t>(kUnitColumns, end - column));
        add_halves(_mm512_slli_epi32(values, 16));
        add_halves(_mm512_and_si512(values, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    return static_cast<float>(_mm512_reduce_add_pd(_mm512_add_pd(total[0], total[1])));
}

// A block of streams: 1, 2, 3, or groups of 4, 8, .. 20 for single tiles, of 8, 10 or 12 for panels. Group g holds streams
// [begin(g), begin(g) + size(g)) of it; its pairs stand at x + begin(g) * pairs as [pairs][its streams], its sums at
// sums + begin(g) * segments as [segments][its streams].
struct StreamBlock {
    int64_t first, count, most, step, pairs, segments;
    uint32_t* x;
    float* sums;

    int64_t steps() const { return ceil_div(count, step); }
    int64_t groups() const { return ceil_div(count, most); }
    int64_t begin(int64_t group) const { return steps() * group / groups() * step; }
    int size(int64_t group) const { return static_cast<int>(begin(group + 1) - begin(group)); }
    uint32_t* x_of(int64_t group) const { return x + begin(group) * pairs; }
    float* sums_of(int64_t group) const { return sums + begin(group) * segments; }
};

// The 16 pairs of each of four streams, of which `count` are stored side by side: x[16][size].
inline void store_pairs(const __m512i (&of)[4], int64_t count, int64_t size, uint32_t* x) {
    const __m512i low[2] = {_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpacklo_epi32(of[2], of[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[2], of[3])};
    // Register i has the streams' pairs i, 4 + i, 8 + i and 12 + i.
    const __m512i quads[4] = {_mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
                              _mm512_unpacklo_epi64(high[0], high[1]),
                              _mm512_unpackhi_epi64(high[0], high[1])};
    const __mmask8 mask = static_cast<__mmask8>((1 << count) - 1);
    each_number<4>([&](auto lane) MMQ_INLINE_LAMBDA {
        each_number<4>([&](auto i) MMQ_INLINE_LAMBDA {
            const __m128i quad = _mm512_extracti32x4_epi32(quads[i], lane);
            uint32_t* to = x + (4 * lane + i) * size;
            if (count == 4) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to), quad);
            } else {
                _mm_mask_storeu_epi32(to, mask, quad);
            }
        });
    });
}

// Units [begin, end) of a group. Streams past the last token are zeros: cheaper than kernels for every number.
void load_units(const GemmArgs& args, const StreamBlock& block, int64_t group, int64_t begin, int64_t end) {
    const int64_t size = block.size(group), first = block.begin(group);
    for (int64_t unit = begin; unit < end; ++unit) {  // outermost: what a unit becomes stays in level 1
        uint32_t* x = block.x_of(group) + unit * kUnitPairs * size;
        if (size == 1) {
            _mm512_storeu_si512(x, load_pairs(args, block.first + first, unit));
            continue;
        }
        for (int64_t s = 0; s < size; s += 4) {
            __m512i pairs[4];
            for (int64_t i = 0; i < 4; ++i) {
                const int64_t stream = first + s + i;
                pairs[i] = stream < block.count ? load_pairs(args, block.first + stream, unit)
                                                : _mm512_setzero_si512();
            }
            store_pairs(pairs, std::min<int64_t>(4, size - s), size, x + s);
        }
    }
}

// Sums over segments of all streams of a group, [segments][streams]: those whose number is a part of all.
void sum_segments(const GemmArgs& args, const StreamBlock& block, int64_t group, int64_t part,
                  int64_t parts) {
    const int64_t size = block.size(group), first = block.begin(group);
    const int64_t last = std::min(size, block.count - first);
    each_segment_of(args.weight, part, parts, [&](int64_t begin, int64_t end, int64_t segment) {
        float* sums = block.sums_of(group) + segment * size;
        for (int64_t s = 0; s < size; ++s)
            sums[s] = s < last ? sum_columns(args, block.first + first + s, begin, end) : 0.0f;
    });
}

void load_block(const GemmArgs& args, const StreamBlock& block, int threads) {
    const int64_t units = units_of(args.weight.k), groups = block.groups();
    const int64_t parts = block.count > 4 ? threads : 1;  // a fork costs more than few streams
    parallel_for(threads, groups * parts, 1, [&](int64_t i) {
        const int64_t group = i / parts, part = i % parts;
        load_units(args, block, group, units * part / parts, units * (part + 1) / parts);
        if (args.weight.zero != nullptr) sum_segments(args, block, group, part, parts);
    });
}
