// Epilogues of the gemm on rows of fp32 values.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/args.h"

namespace mmq {

inline float activate(float y, Activation activation) {
    switch (activation) {
        case Activation::kRelu:
            return y < 0.0f ? 0.0f : y;
        case Activation::kGelu:
            return 0.5f * y * (1.0f + std::erf(y * 0.70710678118654752f));
        case Activation::kGeluTanh:
            return 0.5f * y * (1.0f + std::tanh(0.79788456080286536f * (y + 0.044715f * y * y * y)));
        case Activation::kQuickGelu:
            return y / (1.0f + std::exp(-1.702f * y));
        case Activation::kSilu:
            return y / (1.0f + std::exp(-y));
        default:
            return y;
    }
}

inline void activate_row(float* y, int64_t count, Activation activation) {
    if (activation == Activation::kNone) return;
    for (int64_t i = 0; i < count; ++i) y[i] = activate(y[i], activation);
}

}  // namespace mmq
