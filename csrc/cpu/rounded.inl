// unit[m] = max |x[m]| / 127,   x8[m, k] = rint(x[m, k] / unit[m])
//
// Activations rounded to 8 bits, anew for each token, which is one stream. Sums are rounded one operation at a time, so that up
// to the epilogue all instruction sets and backends/reference.py give the same bits. A token that holds NaN or infinity gets
// outputs of NaN. Included inside an anonymous namespace after integer.inl.

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
    const float unit = folded<kLanes>(most, [](float a, float b) { return std::max(a, b); }) / 127.0f;
    return std::max(unit, smallest_normal(Dtype::kFloat32)) + folded<kLanes>(poison, std::plus<float>());
}

struct Rounded {
    static constexpr int kDigits = 1;
    static constexpr bool kApart = false, kBlocks = true;

    static bool code(const CodedTokens& to, const Weight& w, int64_t token, const float* x, int8_t* row) {
        constexpr float kRound =
            12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction, halves to even
        // Copies of what bytes, which may be anything's, could seem to write to.
        const int64_t k = w.k, steps = to.steps, tokens = to.tokens_of(to.block_of(token));
        int8_t* codes = to.codes_of(token);
        if (tokens == 1) row = codes;
        const float unit = unit_of(x, k);
        std::memset(row, 0, static_cast<size_t>(steps * kStepColumns));
        if (unit == unit) {
            for (int64_t i = 0; i < k; ++i)
                row[i] = static_cast<int8_t>(static_cast<int>((x[i] / unit + kRound) - kRound));
        }
        for (int64_t step = 0; tokens > 1 && step < steps; ++step)
            std::memcpy(codes + step * tokens * kStepColumns, row + step * kStepColumns, kStepColumns);
        int32_t* minus = to.minus_of(token);
        float* units = to.unit_of(token);
        each_segment(w, [&](int64_t begin, int64_t end, int64_t) {
            int32_t sum = 0;
            for (int64_t i = begin; i < end; ++i) sum += row[i];
            *minus = -sum;
            *units = unit;
            minus += tokens;
            units += tokens;
        });
        return true;
    }

    static MMQ_INLINE F16 add_segment(F16 y, F16 scale, const I16* sums, float) {
        return add(y, mul(scale, to_float(sums[0])));
    }
    static MMQ_INLINE F16 finish(F16 y, float unit) { return mul(y, set1(unit)); }
};

template <int BITS>
void gemm_integer_bits(const GemmArgs& args) {
    multiply_coded<BITS, Rounded>(args);
}
