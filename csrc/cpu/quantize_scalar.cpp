// quantize_rtn, gptq_block, search_grid and descend in portable C++; the kernels are in quantize.inl
// and descend.inl.
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

namespace mmq {
namespace {

#include "vec_scalar.h"
#include "../common/grid.inl"
#include "../common/descent.inl"
#include "quantize.inl"
#include "descend.inl"

}  // namespace

void quantize_rtn_scalar(const RtnArgs& args) {
    rtn(args);
}

void gptq_block_scalar(const GptqArgs& args) {
    gptq(args);
}

void search_grid_scalar(const SearchArgs& args) {
    search(args);
}

void descend_scalar(const DescendArgs& args) {
    descend_group(args);
}

}  // namespace mmq
