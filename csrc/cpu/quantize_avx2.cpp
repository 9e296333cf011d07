// quantize_rtn and gptq_block in AVX2; the kernels are in quantize.inl.
#if defined(__x86_64__)
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../common/args.h"
#include "../common/layout.h"
#include "aligned.h"
#include "../common/half.h"
#include "kernels.h"
#include "parallel.h"

// After every shared header: their inline functions must not be compiled for this instruction set.
#pragma GCC target("avx2")

namespace mmq {
namespace {

#include "../common/grid.inl"
#include "quantize.inl"

}  // namespace

void quantize_rtn_avx2(const RtnArgs& args) {
    rtn(args);
}

void gptq_block_avx2(const GptqArgs& args) {
    gptq(args);
}

}  // namespace mmq

#endif  // x86-64
