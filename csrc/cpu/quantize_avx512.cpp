// quantize_rtn, gptq_block, search_grid and descend in AVX-512 (F, BW, DQ, VL); the kernels are in quantize.inl
// and descend.inl.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

namespace mmq {
namespace {

#include "vec_avx512.h"
#include "../common/grid.inl"
#include "../common/descent.inl"
#include "quantize.inl"
#include "descend.inl"

}  // namespace

void quantize_rtn_avx512(const RtnArgs& args) {
    rtn(args);
}

void gptq_block_avx512(const GptqArgs& args) {
    gptq(args);
}

void search_grid_avx512(const SearchArgs& args) {
    search(args);
}

void descend_avx512(const DescendArgs& args) {
    descend_group(args);
}

}  // namespace mmq

#endif  // x86-64
