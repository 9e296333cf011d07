// x[m, k] = unit[m, s] * (d[0] + 256 d[1] + 65536 d[2] + ...)    for the columns k of a segment s, -128 <= d <= 127
//
// Float activations by products of integers, without rounding them to 8 bits: in a segment a token's numbers are fixed-point
// numbers of a few bytes, and each of these digits is a stream. FMA multiplies 8 numbers at a time, which codes have to become
// floats for; bytes are multiplied 32 at a time, as they are. What is added up is exact. Included inside an anonymous namespace
// after integer.inl.
//
// Short: two digits, for x in bf16, which loses nothing. Its 8 bits are exact down to 2^-8 of the largest number of a segment; what
// is finer, or too large where most are much smaller, is a column apart, multiplied as a float. (Of fp16, which has 11 bits, too
// many are.)
//
// Fixed<3>, Fixed<4>: all columns, of one token, whose largest number of a segment has 23 or 31 bits; smaller ones lose what is
// below the unit. A token is refused where that could be seen beside the roundings of fp32:
//
//     the root of the sum of the squares of what was lost may be 2^-24 of the sum of |x|, without the largest of every 16th
//     column: large numbers may meet weights of 0;
//     one column in eight may lose more than 2^-16 of itself: large numbers may be many.
//
// A token that holds NaN or infinity is refused too.

// --- digits ---

inline float total(F16 a) {
    alignas(64) float lanes[kTileRows];
    store(lanes, a);
    return folded<kTileRows>(lanes, std::plus<float>());
}
inline float largest_of(F16 a) {
    alignas(64) float lanes[kTileRows];
    store(lanes, a);
    return folded<kTileRows>(lanes, [](float x, float y) { return std::max(x, y); });
}
inline int exponent_of(float positive) {
    uint32_t bits;
    std::memcpy(&bits, &positive, sizeof bits);
    return static_cast<int>(bits >> 23) - 127;
}
inline float power_of_two(int exponent) {
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

// The exponent of the unit of which the largest number has DIGITS digits: 127 in every digit is a little less than a power of
// two. Of what is all but 0, units stay normal numbers.
template <int DIGITS>
int exponent_of_unit(float largest) {
    constexpr float kRoom = 129.0f / 128;
    return std::max(exponent_of(largest * kRoom), -90) + 2 - 8 * DIGITS;
}

// A token's numbers of one segment, and zeros up to whole registers.
struct Run {
    alignas(64) float x[kSegmentColumns];
    int64_t columns, padded;

    Run(const float* from, int64_t count) : columns(count), padded(ceil_div(count, kTileRows) * kTileRows) {
        std::copy_n(from, count, x);
        std::fill_n(x + count, padded - count, 0.0f);
    }

    // body(the first of 16 columns, their numbers)
    template <class Body>
    MMQ_INLINE void each(const Body& body) const {
        for (int64_t i = 0; i < padded; i += kTileRows) body(i, load(x + i));
    }
};

// Takes the whole numbers of a segment, 16 at a time, and leaves DIGITS bytes of each step, `stride` bytes from step to step.
template <int DIGITS>
class DigitWriter {
  public:
    DigitWriter(int8_t* codes, int64_t stride, int64_t columns)
        : codes_(codes), stride_(stride), steps_(ceil_div(columns, kGrainColumns) * kGrainSteps) {}

    MMQ_INLINE void write(I16 whole) {
        // Digits are signed: what is 128 and more carries into the next. Of each step, four columns of four bytes, the first
        // bytes of all columns, the second bytes, ...
        const I16 carry = set1_word(static_cast<int32_t>(0x80808080u));
        const I16 digits = transposed_bytes(centre_bytes(add_words(whole, carry)));
        sums_ = dot<4>(sums_, set1_word(0x01010101), digits);
        alignas(64) int32_t steps[kTileRows];
        store_words(steps, digits);
        const int64_t count = std::min<int64_t>(steps_, kTileRows / kStepColumns);
        for (int64_t step = 0; step < count; ++step, codes_ += stride_)
            std::memcpy(codes_, steps + step * kStepColumns, DIGITS * kStepColumns);
        steps_ -= count;
    }

    // The sums of the digits, negated.
    void store_minus(int32_t* minus) const {
        alignas(64) int32_t lanes[kTileRows];
        store_words(lanes, sums_);
        for (int digit = 0; digit < DIGITS; ++digit)
            minus[digit] = -(lanes[digit] + lanes[digit + 4] + lanes[digit + 8] + lanes[digit + 12]);
    }

  private:
    int8_t* codes_;
    int64_t stride_, steps_;
    I16 sums_ = set1_word(0);
};

// What both codings have in common.
template <int DIGITS>
struct ByDigits {
    static constexpr int kDigits = DIGITS;

    // body(first column, Run, DigitWriter, unit) for each segment of a token, until one is false.
    template <class Body>
    static bool code_segments(const CodedTokens& to, const Weight& w, int64_t token, const float* x,
                              const Body& body) {
        const int64_t tokens = to.tokens_of(to.block_of(token)), stride = tokens * (DIGITS * kStepColumns);
        int8_t* codes = to.codes_of(token);
        int32_t* minus = to.minus_of(token);
        float* unit = to.unit_of(token);
        bool fits = true;
        each_segment(w, [&](int64_t begin, int64_t end, int64_t) {
            if (!fits) return;
            DigitWriter<DIGITS> out(codes + begin / kStepColumns * stride, stride, end - begin);
            fits = body(begin, Run(x + begin, end - begin), out, *unit);
            out.store_minus(minus);
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
};

// --- two digits, and columns apart ---

struct Short : ByDigits<2> {
    static constexpr bool kApart = true, kBlocks = true;

    static bool code(const CodedTokens& to, const Weight& w, int64_t token, const float* x, int8_t*) {
        Apart* apart = to.apart_of(token);
        int32_t* end = to.apart_end_of(token);
        int64_t count = 0;
        return code_segments(to, w, token, x, [&](int64_t begin, const Run& run, auto& out, float& unit) {
            const int exponent = best_exponent(run);
            unit = power_of_two(exponent);
            run.each([&](int64_t i, F16 numbers) MMQ_INLINE_LAMBDA {
                I16 whole;
                uint32_t left = misfits(numbers, power_of_two(-exponent), whole);
                if (left != 0) {
                    alignas(64) int32_t lanes[kTileRows];
                    store_words(lanes, whole);
                    for (; left != 0; left &= left - 1) {
                        const int lane = __builtin_ctz(left);
                        lanes[lane] = 0;
                        if (count < to.most_apart)
                            apart[count] = {static_cast<uint32_t>(token),
                                            static_cast<uint32_t>(begin + i + lane), run.x[i + lane]};
                        ++count;
                    }
                    whole = load_words(lanes);
                }
                out.write(whole);
            });
            *end++ = static_cast<int32_t>(count);
            return count <= to.most_apart;
        });
    }

  private:
    // Which of the numbers are not whole multiples of the unit of two digits, a bit each; `units` make 1.
    static MMQ_INLINE uint32_t misfits(F16 numbers, float units, I16& whole) {
        const F16 value = mul(numbers, set1(units));
        whole = clamped(to_words(value), -128 * 257, 127 * 257);
        return lanes_beyond(absolute(sub(value, to_float(whole))), set1(0.0f));
    }

    // The exponent of a unit that leaves few columns apart: that of the largest number, or a lower one, which leaves the largest
    // apart and has more bits for the others.
    static int best_exponent(const Run& run) {
        F16 most = set1(0.0f);
        run.each([&](int64_t, F16 numbers) MMQ_INLINE_LAMBDA { most = larger(absolute(numbers), most); });
        const auto left_apart = [&](int exponent) {
            int count = 0;
            run.each([&](int64_t, F16 numbers) MMQ_INLINE_LAMBDA {
                I16 whole;
                count += __builtin_popcount(misfits(numbers, power_of_two(-exponent), whole));
            });
            return count;
        };
        constexpr int kStep = 4, kLowest = 28, kLeast = -124;
        const int highest = exponent_of_unit<2>(largest_of(most));
        int best = highest, fewest = left_apart(highest);
        for (int down = kStep; down <= kLowest && fewest > run.columns / 16; down += kStep) {
            const int exponent = std::max(highest - down, kLeast), left = left_apart(exponent);
            if (left < fewest) best = exponent, fewest = left;
        }
        return best;
    }
};

// --- more digits of all columns ---

template <int DIGITS>
struct Fixed : ByDigits<DIGITS> {
    static constexpr bool kApart = false, kBlocks = false;

    static bool code(const CodedTokens& to, const Weight& w, int64_t token, const float* x, int8_t*) {
        return Fixed::code_segments(to, w, token, x, [](int64_t, const Run& run, auto& out, float& unit) {
            F16 most = set1(0.0f), sum = most, lost = most;
            run.each([&](int64_t, F16 numbers) MMQ_INLINE_LAMBDA {
                const F16 size = absolute(numbers);
                most = larger(size, most);
                sum = add(sum, size);
            });
            const float others = total(sub(sum, most));
            if (!(total(sum) <= kMost)) return false;
            const int exponent = exponent_of_unit<DIGITS>(largest_of(most));
            unit = power_of_two(exponent);
            const float units = power_of_two(-exponent);  // of 1
            int changed = 0;
            run.each([&](int64_t, F16 numbers) MMQ_INLINE_LAMBDA {
                const F16 value = mul(numbers, set1(units));
                const I16 whole = to_words(value);
                const F16 rest = sub(value, to_float(whole));
                lost = fma(rest, rest, lost);
                changed +=
                    __builtin_popcount(lanes_beyond(absolute(rest), mul(absolute(value), set1(0x1p-16f))));
                out.write(whole);
            });
            const float may_lose = 0x1p-24f * units * others;
            return total(lost) <= may_lose * may_lose && changed <= run.columns / 8;
        });
    }

  private:
    static constexpr float kMost = 0x1p120f;  // of the sum of a segment's |x|
};

// --- entry ---

// Tokens up to which these are faster than FMA, as measured on Zen 3. A code of 8 bits takes little to become a float, one of 7
// bits is multiplied without sums in 16 bits.
template <int BITS>
constexpr int64_t kShortTokens = BITS < 5    ? INT64_MAX
                                 : BITS == 5 ? 64
                                 : BITS == 6 ? 16
                                 : BITS == 7 ? 2
                                             : 0;
template <int BITS>
constexpr int64_t kFixedTokens = BITS < 8 ? 1 : 0;

// False, and y is not worth anything, where tokens are refused, or FMA is faster.
template <int BITS>
bool gemm_fixed(const GemmArgs& args) {
    if constexpr (kShortTokens<BITS> > 0) {
        const bool bf16 = args.dtype == Dtype::kBFloat16;
        if (bf16 && args.m <= kShortTokens<BITS> && multiply_coded<BITS, Short>(args)) return true;
    }
    if constexpr (kFixedTokens<BITS> > 0) {
        return args.m <= kFixedTokens<BITS> &&
               (multiply_coded<BITS, Fixed<3>>(args) || multiply_coded<BITS, Fixed<4>>(args));
    }
    return false;
}
