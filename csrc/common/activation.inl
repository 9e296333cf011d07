// Epilogues of the gemm on one fp32 value. Included inside an anonymous namespace of a kernel file: straight-line code
// without calls, which the CPU's loops over lanes turn into vectors and a GPU runs as it is.

// e^x to about 1e-7 relative, for x in [-87, 88] and clamped there; NaN stays NaN.
// x = n ln 2 + r, |r| <= ln(2)/2.
MMQ_BOTH inline float exponential(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504088896341f + kRound;
    const float n = shifted - kRound;
    const float r =
        (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
    // Taylor's terms to r^7 / 7!: the next is below 6e-9.
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * float_of((bits_of(shifted) - bits_of(kRound) + 127u) << 23);
}

// x / (1 + e^-z)
MMQ_BOTH inline float times_sigmoid(float x, float z) {
    return x / (1.0f + exponential(-z));
}

// x * Phi(x) = x * erfc(-x / sqrt 2) / 2, with the Chebyshev fit of erfc in Press et al., Numerical
// Recipes, 6.2: its relative error stays below 1.2e-7 far into the tail, where 1 + erf would cancel.
MMQ_BOTH inline float gelu_erf(float x) {
    const float z = std::fabs(x) * 0.70710678118654752f;
    const float t = 1.0f / (1.0f + 0.5f * z);
    float p = 0.17087277f;
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const float tail = 0.5f * t * exponential(p - z * z);  // half of erfc(z)
    return x < 0.0f ? x * tail : x - x * tail;
}

MMQ_BOTH inline float gelu_tanh(float x) {
    // (1 + tanh u) / 2 is the sigmoid of 2u.
    return times_sigmoid(x, 1.59576912160573071f * (x + 0.044715f * x * x * x));
}

MMQ_BOTH inline float activated(float x, Activation activation) {
    switch (activation) {
        case Activation::kRelu:
            return x < 0.0f ? 0.0f : x;
        case Activation::kGelu:
            return gelu_erf(x);
        case Activation::kGeluTanh:
            return gelu_tanh(x);
        case Activation::kQuickGelu:
            return times_sigmoid(x, 1.702f * x);
        case Activation::kSilu:
            return times_sigmoid(x, x);
        default:
            return x;
    }
}
