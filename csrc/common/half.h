// fp16 and bf16 <-> fp32 in integer arithmetic: the same bits on every instruction set, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "args.h"

namespace mmq {

MMQ_BOTH inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

MMQ_BOTH inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

MMQ_BOTH inline float bf16_to_float(uint16_t h) {
    return float_of(static_cast<uint32_t>(h) << 16);
}

MMQ_BOTH inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN, made quiet
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

MMQ_BOTH inline float fp16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, body = h & 0x7fff;
    if (body >= 0x7c00) return float_of(sign | 0x7f800000u | ((body & 0x3ff) << 13));
    // 2^112 moves the exponent from fp16's bias to fp32's; the product is exact for subnormals too.
    return float_of(sign | bits_of(float_of(body << 13) * float_of(0x77800000u)));
}

MMQ_BOTH inline uint16_t float_to_fp16(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, body = bits & 0x7fffffff;
    if (body > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
    if (body >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on: infinity
    if (body < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits of the sum.
        return static_cast<uint16_t>(sign | (bits_of(float_of(body) + 0.5f) - bits_of(0.5f)));
    }
    return static_cast<uint16_t>(sign | ((body + 0xfff + ((body >> 13) & 1) - 0x38000000u) >> 13));
}

MMQ_BOTH inline float round_to(float value, Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat16:
            return fp16_to_float(float_to_fp16(value));
        case Dtype::kBFloat16:
            return bf16_to_float(float_to_bf16(value));
        default:
            return value;
    }
}

MMQ_BOTH inline float smallest_normal(Dtype dtype) {
    return dtype == Dtype::kFloat16 ? 6.103515625e-05f : 1.1754943508222875e-38f;
}

MMQ_BOTH inline float load_as_float(const void* source, Dtype dtype, int64_t i) {
    switch (dtype) {
        case Dtype::kFloat16:
            return fp16_to_float(static_cast<const uint16_t*>(source)[i]);
        case Dtype::kBFloat16:
            return bf16_to_float(static_cast<const uint16_t*>(source)[i]);
        default:
            return static_cast<const float*>(source)[i];
    }
}

// count floats of any dtype -> fp32
MMQ_BOTH inline void load_row(const void* source, Dtype dtype, int64_t offset, int64_t count, float* out) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(out, static_cast<const float*>(source) + offset, count * sizeof(float));
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
    if (dtype == Dtype::kFloat16) {
        for (int64_t i = 0; i < count; ++i) out[i] = fp16_to_float(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(from[i]);
    }
}

// count fp32 values -> any dtype, ties to even
MMQ_BOTH inline void store_row(const float* values, Dtype dtype, int64_t offset, int64_t count, void* out) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(static_cast<float*>(out) + offset, values, count * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(out) + offset;
    if (dtype == Dtype::kFloat16) {
        for (int64_t i = 0; i < count; ++i) to[i] = float_to_fp16(values[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = float_to_bf16(values[i]);
    }
}

}  // namespace mmq
