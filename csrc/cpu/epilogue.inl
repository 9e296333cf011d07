// What products have in common: how many threads they are worth, and the way of a register of 16 rows to y. Included inside
// an anonymous namespace of a kernel file, after a register of 16 rows (vec_*.h) and activation.inl.

// As many threads as find work for about 10 us: waking one takes several.
inline int useful_threads(const GemmArgs& args) {
    constexpr int64_t kLeastWork = 1 << 18;  // multiplications
    const int64_t work = args.m * tiles_of(args.weight.n) * kTileRows * args.weight.k;
    return static_cast<int>(std::clamp<int64_t>(work / kLeastWork, 1, args.threads));
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
    store_row(out, args.dtype, token * n + row, std::min<int64_t>(kTileRows, n - row), args.y);
}
