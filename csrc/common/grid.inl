// The grid of a group of weights, and the code of a weight on it. For the inside of an anonymous namespace.
//
//   grid of a group   low = min(w, 0), high = max(w, 0)
//                     span  = high - low                                     symmetric: 2 * max(-low, high)
//                     scale = round_to(scale_dtype, span / (2^bits - 1))
//                     zero  = clamp(rint(-low / scale), 0, 2^bits - 1)       symmetric: 2^(bits-1)
//   code              q = clamp(rint(w / scale) + zero, 0, 2^bits - 1)
//
// Every step is one fp32 operation rounded once, in the order that backends/reference.py has them: true divisions, no
// fused multiply-subtract (the build says -ffp-contract=off and -fmad=false). So the CPU's instruction sets, GPUs and
// torch agree bit for bit.

// Nearest integer, halves to even, for |value| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
MMQ_BOTH inline float nearest(float value) {
    return (value + 12582912.0f) - 12582912.0f;
}

MMQ_BOTH inline float clamp_to(float value, float low, float high) {
    value = value > low ? value : low;
    return value < high ? value : high;
}

// The clamp before rounding changes no code (zero and codes are at most 255); `nearest` stays in its range.
MMQ_BOTH inline float encode(float weight, float scale, float zero, float max_code) {
    return clamp_to(nearest(clamp_to(weight / scale, -1024.0f, 1024.0f)) + zero, 0.0f, max_code);
}

struct GridRule {
    bool symmetric;
    float max_code, middle;
    Dtype scale_dtype;

    template <class Args>
    MMQ_BOTH explicit GridRule(const Args& args)
        : symmetric(args.symmetric),
          max_code(static_cast<float>((1 << args.bits) - 1)),
          middle(static_cast<float>(middle_code(args.bits))),
          scale_dtype(args.scale_dtype) {}

    // low <= 0 <= high
    MMQ_BOTH void find(float low, float high, float* scale, float* zero) const {
        const float span = symmetric ? 2.0f * (-low > high ? -low : high) : high - low;
        const float rounded = round_to(span / max_code, scale_dtype);
        const float least = smallest_normal(scale_dtype);
        *scale = span == 0.0f ? 1.0f : (rounded > least ? rounded : least);
        *zero =
            symmetric ? middle : clamp_to(nearest(clamp_to(-low / *scale, 0.0f, 1024.0f)), 0.0f, max_code);
    }
};
