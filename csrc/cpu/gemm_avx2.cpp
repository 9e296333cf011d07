// gemm and dequantize in AVX2, FMA, F16C; the kernels are in gemm.inl, fixed.inl and integer.inl.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>

#include "../common/args.h"
#include "../common/layout.h"
#include "aligned.h"
#include "../common/half.h"
#include "kernels.h"
#include "parallel.h"
#include "regions.h"
#include "tables.h"

// After every shared header: their inline functions must not be compiled for this instruction set.
#pragma GCC target("avx2,fma,f16c")

namespace mmq {
namespace {

#include "vec_avx2.h"
#include "codes_by_mask.h"
#include "unroll.h"
#include "decode.inl"
#include "../common/activation.inl"
#include "activation.inl"
#include "outputs.inl"
#include "gemm.inl"
#include "dot_avx2.h"
#include "steps.inl"
#include "integer.inl"
#include "fixed.inl"

template <int BITS>
void gemm_fixed_or_float(const GemmArgs& args) {
    if (!gemm_fixed<BITS>(args)) gemm_bits<BITS>(args);
}

}  // namespace

void gemm_avx2(const GemmArgs& args) {
    MMQ_FOR_BITS(gemm_fixed_or_float)
}

void dequantize_avx2(const DequantizeArgs& args) {
    MMQ_FOR_BITS(dequantize_bits)
}

}  // namespace mmq

#endif  // x86-64
