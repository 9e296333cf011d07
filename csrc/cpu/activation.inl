// Epilogues of the gemm on 16 fp32 values, one loop for each activation so that it becomes vectors of the instruction
// set. Included inside an anonymous namespace of a kernel file, after common/activation.inl.

template <Activation kActivation>
inline void each_lane(float* y) {
    for (int i = 0; i < kTileRows; ++i) y[i] = activated(y[i], kActivation);
}

inline void activate(float* y, Activation activation) {
    switch (activation) {
        case Activation::kNone:
            return;
        case Activation::kRelu:
            return each_lane<Activation::kRelu>(y);
        case Activation::kGelu:
            return each_lane<Activation::kGelu>(y);
        case Activation::kGeluTanh:
            return each_lane<Activation::kGeluTanh>(y);
        case Activation::kQuickGelu:
            return each_lane<Activation::kQuickGelu>(y);
        case Activation::kSilu:
            return each_lane<Activation::kSilu>(y);
    }
}
