// quantize_rtn, gptq_block, search_grid and descend in AVX2; the kernels are in quantize.inl
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
#include "regions.h"
#include "tables.h"

// After every shared header: their inline functions must not be compiled for this instruction set.
#pragma GCC target("avx2")

namespace mmq {
namespace {

#include "vec_avx2.h"
#include "../common/grid.inl"
#include "../common/descent.inl"
#include "quantize.inl"
#include "descend.inl"

}  // namespace

void quantize_rtn_avx2(const RtnArgs& args) {
    rtn(args);
}

void gptq_block_avx2(const GptqArgs& args) {
    gptq(args);
}

void search_grid_avx2(const SearchArgs& args) {
    search(args);
}

void descend_avx2(const DescendArgs& args) {
    descend_group(args);
}

}  // namespace mmq

#endif  // x86-64
