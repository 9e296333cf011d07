// gemm with activations of 8 bits in AVX2, FMA, F16C; the kernel is in integer.inl and rounded.inl.
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
#include "dot_avx2.h"
#include "../common/activation.inl"
#include "activation.inl"
#include "outputs.inl"
#include "steps.inl"
#include "integer.inl"
#include "rounded.inl"

}  // namespace

void gemm_integer_avx2(const GemmArgs& args) {
    MMQ_FOR_BITS(gemm_integer_bits)
}

}  // namespace mmq

#endif  // x86-64
