// gemm with activations of 8 bits in portable C++; the kernel is in integer.inl and rounded.inl.

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

namespace mmq {
namespace {

#include "vec_scalar.h"
#include "codes_by_mask.h"
#include "unroll.h"
#include "decode.inl"
#include "dot_scalar.h"
#include "../common/activation.inl"
#include "activation.inl"
#include "outputs.inl"
#include "steps.inl"
#include "integer.inl"
#include "rounded.inl"

}  // namespace

void gemm_integer_scalar(const GemmArgs& args) {
    MMQ_FOR_BITS(gemm_integer_bits)
}

}  // namespace mmq
