// quantize_rtn and gptq_block in portable C++; the kernels are in quantize.inl.
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

namespace mmq {
namespace {

#include "../common/grid.inl"
#include "quantize.inl"

}  // namespace

void quantize_rtn_scalar(const RtnArgs& args) {
    rtn(args);
}

void gptq_block_scalar(const GptqArgs& args) {
    gptq(args);
}

}  // namespace mmq
