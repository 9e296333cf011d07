// x[m, k] = unit[m, s] * (d[0] + 256 d[1] + 65536 d[2] + ...)    for the columns k of a segment s, -128 <= d <= 127
//
// Float activations by products of integers, without rounding them to 8 bits: in a segment a token's numbers are fixed-point
// numbers of DIGITS bytes, and each digit is a stream. With few tokens, FMA waits for codes to become floats, eight of them by
// three or four operations; bytes need none, and are multiplied 32 at a time. What is added up is exact. Included inside an
// anonymous namespace after integer.inl.
//
// The largest number of a segment has 8 * DIGITS - 1 bits, and a smaller one loses what is below the unit: of bf16 nothing from
// 2^-15 of the largest on (3 digits), of fp32 from 2^-6 on (4 digits). A token is refused where that could be seen beside the
// roundings of fp32. The root of the sum of the squares of what was lost may be
//
//     2^-24 of the sum of |x|, without the largest of every 16th column: large numbers may meet weights of 0,
//     2^-16 of the sum of |x| of those that lost: so much at most, whatever all others meet.
//
// A token that holds NaN or infinity is refused too.

template <int DIGITS>
struct Fixed {
    static constexpr int kDigits = DIGITS;

    static bool code(const CodedTokens& to, const Weight& w, int64_t token, const float* x, int8_t*) {
        const int64_t tokens = to.tokens_of(to.block_of(token)), stride = tokens * (DIGITS * kStepColumns);
        int8_t* codes = to.codes_of(token);
        int32_t* minus = to.minus_of(token);
        float* unit = to.unit_of(token);
        bool fits = true;
        each_segment(w, [&](int64_t begin, int64_t end, int64_t) {
            fits = fits && code_segment(x + begin, end - begin, codes + begin / kStepColumns * stride, stride,
                                        minus, *unit);
            minus += tokens * DIGITS;
            unit += tokens;
        });
        return fits;
    }

    static MMQ_INLINE F16 add_segment(F16 y, F16 scale, const I16* sums, float unit) {
        F16 all = to_float(sums[DIGITS - 1]);
        each_number<DIGITS - 1>(
            [&](auto d) MMQ_INLINE_LAMBDA { all = fma(all, set1(256.0f), to_float(sums[DIGITS - 2 - d])); });
        return fma(scale, mul(all, set1(unit)), y);
    }
    static MMQ_INLINE F16 finish(F16 y, float) { return y; }

  private:
    static constexpr int kBits = 8 * DIGITS - 1;
    static constexpr float kMost = 0x1p120f;  // of the sum of a segment's |x|

    // Columns of one segment -> digits of each step, `stride` bytes from step to step, and their sums, negated.
    static bool code_segment(const float* x, int64_t count, int8_t* codes, int64_t stride, int32_t* minus,
                             float& unit) {
        alignas(64) float run[kSegmentColumns];
        const int64_t padded = ceil_div(count, kTileRows) * kTileRows;
        std::copy_n(x, count, run);
        std::fill_n(run + count, padded - count, 0.0f);
        const F16 none = set1(0.0f);
        F16 most = none, sum = none, lost = none, losing = none;
        for (int64_t i = 0; i < padded; i += kTileRows) {
            const F16 size = absolute(load(run + i));
            most = larger(size, most);
            sum = add(sum, size);
        }
        const float others = total(sub(sum, most)), largest = largest_of(most);
        if (!(total(sum) <= kMost)) return false;
        // 127 in every digit is a little less than 2^kBits. Of what is all but 0, units stay normal numbers.
        constexpr float kRoom = 129.0f / 128;
        const int exponent = std::max(exponent_of(largest * kRoom), -90) + 1 - kBits;
        unit = power_of_two(exponent);
        const float units = power_of_two(-exponent);  // of 1
        // Digits are signed: what is 128 and more carries into the next.
        const I16 carry = set1_word(static_cast<int32_t>(0x80808080u)), ones = set1_word(0x01010101);
        I16 sums = set1_word(0);
        for (int64_t i = 0; i < padded; i += kTileRows) {
            const F16 value = mul(load(run + i), set1(units));
            const I16 whole = to_words(value);
            const F16 rest = sub(value, to_float(whole));
            lost = fma(rest, rest, lost);
            losing = add(losing, where_not_zero(rest, absolute(value)));
            // Of each step, four columns of four bytes, the first bytes of all columns, the second bytes, ...
            const I16 digits = transposed_bytes(centre_bytes(add_words(whole, carry)));
            sums = dot<4>(sums, ones, digits);
            alignas(64) int32_t steps[kTileRows];
            store_words(steps, digits);
            const int64_t left = ceil_div(count - i, kGrainColumns) * kGrainSteps;
            for (int64_t step = 0; step < std::min<int64_t>(left, kTileRows / kStepColumns); ++step) {
                std::memcpy(codes, steps + step * kStepColumns, DIGITS * kStepColumns);
                codes += stride;
            }
        }
        alignas(64) int32_t lanes[kTileRows];
        store_words(lanes, sums);
        for (int digit = 0; digit < DIGITS; ++digit)
            minus[digit] = -(lanes[digit] + lanes[digit + 4] + lanes[digit + 8] + lanes[digit + 12]);
        const float may_lose = std::min(0x1p-24f * units * others, 0x1p-16f * total(losing));
        return total(lost) <= may_lose * may_lose;
    }

    static float total(F16 a) {
        alignas(64) float lanes[kTileRows];
        store(lanes, a);
        return folded(lanes, std::plus<float>());
    }
    static float largest_of(F16 a) {
        alignas(64) float lanes[kTileRows];
        store(lanes, a);
        return folded(lanes, [](float x, float y) { return std::max(x, y); });
    }
    static int exponent_of(float positive) {
        uint32_t bits;
        std::memcpy(&bits, &positive, sizeof bits);
        return static_cast<int>(bits >> 23) - 127;
    }
    static float power_of_two(int exponent) {
        const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
        float power;
        std::memcpy(&power, &bits, sizeof power);
        return power;
    }
};

// Streams up to which this is faster than FMA, as measured on Zen 3. A code of 8 bits takes little to become a float.
template <int BITS>
constexpr int kFixedStreams = BITS < 7    ? kMostStreams<BITS>
                              : BITS == 7 ? 4
                                          : 0;

// One or two tokens in as few digits as do; false, and y is not worth anything, where they are more or are refused.
template <int BITS>
bool gemm_fixed(const GemmArgs& args) {
    if constexpr (kFixedStreams<BITS> > 0) {
        const bool half = args.dtype != Dtype::kFloat32;
        if (half && 3 * args.m <= kFixedStreams<BITS> && multiply_coded<BITS, Fixed<3>>(args)) return true;
        return 4 * args.m <= kFixedStreams<BITS> && multiply_coded<BITS, Fixed<4>>(args);
    }
    return false;
}
