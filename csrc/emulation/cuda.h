// The words of CUDA C++ that kernels and launchers use, for g++: included by cuda/platform.cuh under MMQ_EMULATE.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__

#define threadIdx (::mmq::emulation::thread_index())
#define blockIdx (::mmq::emulation::block_index())
#define blockDim (::mmq::emulation::block_size())
#define gridDim (::mmq::emulation::grid_size())
#define __syncthreads() ::mmq::emulation::block_barrier(__FILE__, __LINE__)
#define __syncwarp() ::mmq::emulation::warp_barrier(0xFFFFFFFFu, __FILE__, __LINE__)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline void __threadfence() {}  // the engine orders memory by the atomics themselves

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };

namespace mmq::emulation {

// A launch of `kernel` with one struct of arguments, which the fibers copy as the hardware does.
template <class Kernel, class Args>
void launch_kernel(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   const Args& args) {
    struct Closure {
        Kernel kernel;
        Args args;
    };
    const Closure closure{kernel, args};
    launch(
        name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
        [](const void* held) {
            const Closure* call = static_cast<const Closure*>(held);
            call->kernel(call->args);
        },
        &closure, sizeof closure);
}

}  // namespace mmq::emulation
