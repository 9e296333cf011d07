// gemm by AVX-512-BF16's dot product; the kernels are in gemm_pairs.inl.
#if defined(__x86_64__)
// GCC 12 warns of the registers that its own intrinsics leave undefined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
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
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
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
#include "pairs_avx512.h"
#include "streams.inl"
#include "gemm_pairs.inl"

}  // namespace

void gemm_avx512_bf16(const GemmArgs& args) {
    // x in fp32 is three terms of bf16: half again the products that FMA takes, in half the look-ups. So it pays for one
    // token, where codes are not nibbles or bytes.
    const bool looks_up_most = args.m == 1 && args.weight.bits % 4 != 0;
    if (args.dtype == Dtype::kFloat32 && !looks_up_most) return gemm_avx512(args);
    MMQ_FOR_BITS(gemm_bits)
}

}  // namespace mmq

#endif  // x86-64
