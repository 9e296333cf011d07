// gemm with activations of 8 bits in AVX-512 (F, BW, DQ, VL); the kernel is in integer.inl and rounded.inl.
#if defined(__x86_64__)
// GCC 12 warns of the registers that its own intrinsics leave undefined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
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
#include "tables.h"

// After every shared header: their inline functions must not be compiled for this instruction set.
#if defined(MMQ_EMULATE_AVX512)
#include "../emulation/avx512.h"
#else
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

namespace mmq {
namespace {

#include "vec_avx512.h"
#include "codes_by_mask.h"
#include "unroll.h"
#include "decode.inl"
#define MMQ_VNNI 0
#include "dot_avx512.h"
#include "../common/activation.inl"
#include "activation.inl"
#include "outputs.inl"
#include "steps.inl"
#include "integer.inl"
#include "rounded.inl"

}  // namespace

void gemm_integer_avx512(const GemmArgs& args) {
    MMQ_FOR_BITS(gemm_integer_bits)
}

}  // namespace mmq

#endif  // x86-64
