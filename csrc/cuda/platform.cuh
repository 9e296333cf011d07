// Included first by every CUDA source: what differs between nvcc and the emulation (csrc/emulation), and nothing else.
//
//   MMQ_DYNAMIC_SHARED(name)              the dynamic shared memory, 128-byte aligned
//   MMQ_TRACK(address, bytes, access)     tells the emulation what the next launch may touch
//
// Rules for the sources, which the emulation relies on: shared memory is dynamic only; __syncwarp covers whole warps;
// a kernel takes one struct; kernels are launched by `launch` of runtime.cuh; every instruction that PTX alone has is a
// function of ptx.cuh.
#pragma once

#include <cstdint>

#ifdef MMQ_EMULATE

#include "../emulation/cuda.h"

#define MMQ_DYNAMIC_SHARED(name) \
    unsigned char* name = static_cast<unsigned char*>(::mmq::emulation::dynamic_shared())
#define MMQ_TRACK(address, bytes, access) \
    ::mmq::emulation::track(address, static_cast<size_t>(bytes), ::mmq::emulation::Access::access)

#else

#include <cuda_runtime.h>

#define MMQ_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define MMQ_TRACK(address, bytes, access) static_cast<void>(0)

#endif
