// gemm and dequantize in AVX-512 (F, BW, DQ, VL); the kernels are in gemm.inl.
#if defined(__x86_64__)
// GCC 12 warns of the registers that its own intrinsics leave undefined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
#if defined(MMQ_EMULATE_AVX512)
#include "../emulation/avx512.h"
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace mmq {
namespace {

#include "vec_avx512.h"
#include "codes_by_table.h"
#include "unroll.h"
#include "decode.inl"
#include "../common/activation.inl"
#include "activation.inl"
#include "outputs.inl"
#include "gemm.inl"

}  // namespace

void gemm_avx512(const GemmArgs& args) {
    MMQ_FOR_BITS(gemm_bits)
}

void dequantize_avx512(const DequantizeArgs& args) {
    MMQ_FOR_BITS(dequantize_bits)
}

}  // namespace mmq

#endif  // x86-64
