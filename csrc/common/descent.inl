// Steps of a search for a group's grid and of descent on it: the same lines for CPU and GPU. For the inside of an
// anonymous namespace, after grid.inl. One fp32 operation at a time, as there.
//
// The error of a row is d H d^T with d = w^ - w, and g = d H its gradient on the group's columns. A move `by` along a
// direction v changes it by 2 by (g . v) + by^2 (v H v): slope and curvature below. Sums over columns are made of four,
// of the columns 4i, 4i + 1, 4i + 2 and 4i + 3, each in order, and are (p0 + p1) + (p2 + p3): what the four lanes that
// share a row on a GPU do.

constexpr int kSumParts = 4;
constexpr int kCoarseShares = 4, kFineSteps = 4;  // that are tried, of the group's range

MMQ_BOTH inline float coarse_share(int i) {
    return i == 0 ? 1.0f : i == 1 ? 0.8f : i == 2 ? 0.6f : 0.45f;
}

// A share near the best so far.
MMQ_BOTH inline float fine_share(int i, float best) {
    const float step = i == 0 ? 0.1f : i == 1 ? -0.1f : i == 2 ? 0.05f : -0.05f;
    return clamp_to(best + step, 0.225f, 1.0f);
}

// What a weight adds to the error of a grid.
MMQ_BOTH inline float grid_error(float w, float importance, float scale, float zero, float max_code) {
    const float error = scale * (encode(w, scale, zero, max_code) - zero) - w;
    return error * error * importance;
}

MMQ_BOTH inline float change_by(float by, float slope, float curvature) {
    return 2.0f * by * slope + by * by * curvature;
}

// The scale at its optimum s - slope / curvature, rounded, where that helps; adds the change of the error to `gained`.
MMQ_BOTH inline float moved_scale(float scale, float slope, float curvature, Dtype dtype, float* gained) {
    const float wanted = round_to(scale - slope / curvature, dtype);
    const float gain = change_by(wanted - scale, slope, curvature);
    // NaN, infinity and signs that change fail these comparisons.
    const bool helps = gain < 0.0f && wanted >= smallest_normal(dtype);
    *gained += helps ? gain : 0.0f;
    return helps ? wanted : scale;
}

// The zero point one step further, codes kept, where that helps. All columns move by -scale * step: `slope` is the sum
// of g, `curvature` that of H.
MMQ_BOTH inline float moved_zero(float zero, float step, float scale, float slope, float curvature,
                                 float max_code, float* gained) {
    const float wanted = zero + step;
    const float gain = change_by(-scale * step, slope, curvature);
    const bool helps = wanted >= 0.0f && wanted <= max_code && gain < 0.0f;
    *gained += helps ? gain : 0.0f;
    return helps ? wanted : zero;
}

// The best q - zero of one column with all others as they are, and by how much the weight moves.
MMQ_BOTH inline float moved_code(float centred, float gradient, float diagonal, float scale, float zero,
                                 float max_code, float* moved, float* gained) {
    const float now = scale * centred;
    const float after = encode(now - gradient / diagonal, scale, zero, max_code) - zero;
    const float by = scale * after - now;
    *moved = by;
    *gained += by * (2.0f * gradient + by * diagonal);
    return after;
}
