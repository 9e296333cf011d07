// gemm and dequantize in portable C++; the kernels are in gemm.inl.

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

namespace mmq {
namespace {

#include "vec_scalar.h"
#include "codes_by_mask.h"
#include "unroll.h"
#include "decode.inl"
#include "../common/activation.inl"
#include "activation.inl"
#include "outputs.inl"
#include "gemm.inl"

}  // namespace

void gemm_scalar(const GemmArgs& args) {
    MMQ_FOR_BITS(gemm_bits)
}

void dequantize_scalar(const DequantizeArgs& args) {
    MMQ_FOR_BITS(dequantize_bits)
}

}  // namespace mmq
