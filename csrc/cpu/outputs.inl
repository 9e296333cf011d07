// What every gemm does around its products: how many threads, segments of columns, bias, activation, stores. Included inside
// an anonymous namespace of a kernel file, after decode.inl and activation.inl.

constexpr int64_t kSegmentColumns = 256;

// body(begin, end, group) for the runs of columns that are added up in one go: at most 256 of one group, so that fp32
// sums stay short and a scale is applied to each.
template <class Body>
inline void each_segment(const Weight& w, const Body& body) {
    for (int64_t begin = 0, group = 0; begin < w.k; ++group) {
        const int64_t group_end = std::min(w.k, (group + 1) * w.group_size);
        for (; begin < group_end; begin += kSegmentColumns) {
            body(begin, std::min(group_end, begin + kSegmentColumns), group);
        }
        begin = group_end;
    }
}

inline int64_t count_segments(const Weight& w) {
    int64_t count = 0;
    each_segment(w, [&](int64_t, int64_t, int64_t) { ++count; });
    return count;
}

// body(begin, end, segment) for those segments whose number is a part of all.
template <class Body>
inline void each_segment_of(const Weight& w, int64_t part, int64_t parts, const Body& body) {
    const int64_t count = count_segments(w);
    int64_t segment = 0;
    each_segment(w, [&](int64_t begin, int64_t end, int64_t) {
        if (segment * parts / count == part) body(begin, end, segment);
        ++segment;
    });
}

// As many threads as find work for about 10 us: waking one takes several.
inline int useful_threads(const GemmArgs& args) {
    constexpr int64_t kLeastWork = 1 << 18;  // multiplications
    const int64_t work = args.m * tiles_of(args.weight.n) * kTileRows * args.weight.k;
    return static_cast<int>(std::clamp<int64_t>(work / kLeastWork, 1, args.threads));
}

// Neighbouring tiles that a thread takes at a time: as few runs through memory as leave something to share out when one
// thread is slower. Each begins with waiting for memory.
inline int64_t tiles_in_a_run(const GemmArgs& args, int threads) {
    const int64_t runs = args.m <= 4 ? 2 : 4;
    return std::max<int64_t>(1, tiles_of(args.weight.n) / (runs * threads));
}

// The bias of 16 rows, zeros where there is none.
inline F16 load_bias(const GemmArgs& args, int64_t tile) {
    float bias[kTileRows] = {};
    const int64_t row = tile * kTileRows, count = std::min<int64_t>(kTileRows, args.weight.n - row);
    if (args.bias != nullptr) load_row(args.bias, args.dtype, row, count, bias);
    return load(bias);
}

// Activates and stores 16 rows of one token.
inline void store_outputs(const GemmArgs& args, int64_t tile, int64_t token, F16 value) {
    const int64_t row = tile * kTileRows, n = args.weight.n;
    float out[kTileRows];
    store(out, value);
    activate(out, args.activation);
    // A whole tile by itself: its count is known to the compiler.
    if (row + kTileRows <= n) return store_row(out, args.dtype, token * n + row, kTileRows, args.y);
    store_row(out, args.dtype, token * n + row, n - row, args.y);
}

#define MMQ_FOR_BITS(FUNCTION)        \
    switch (args.weight.bits) {       \
        case 2:                       \
            return FUNCTION<2>(args); \
        case 3:                       \
            return FUNCTION<3>(args); \
        case 4:                       \
            return FUNCTION<4>(args); \
        case 5:                       \
            return FUNCTION<5>(args); \
        case 6:                       \
            return FUNCTION<6>(args); \
        case 7:                       \
            return FUNCTION<7>(args); \
        default:                      \
            return FUNCTION<8>(args); \
    }
