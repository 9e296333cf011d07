// The kernels of one bit width: each of these instantiations has a file of its own, so that they compile in parallel.
#pragma once

#include "gemm.cuh"
#include "runtime.cuh"

namespace mmq::cuda {

template <class T, int kBits>
void launch_gemm(const GemmCall& call, Target target) {
    const auto go = [&](auto* kernel) {
        launch("gemm", kernel, dim3(static_cast<unsigned>(call.plan.blocks)), kGemmThreads,
               call.plan.shared_bytes, target, call);
    };
    switch (call.plan.token_tiles) {
        case 1:
            return go(&gemm_kernel<T, kBits, 1>);
        case 2:
            return go(&gemm_kernel<T, kBits, 2>);
        case 4:
            return go(&gemm_kernel<T, kBits, 4>);
        default:
            return go(&gemm_kernel<T, kBits, 11>);
    }
}

}  // namespace mmq::cuda
