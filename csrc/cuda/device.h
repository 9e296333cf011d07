// What GPUs are here, as plain facts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mmq {

struct CudaDevice {
    std::string name;
    int major, minor;  // compute capability
    int64_t memory_bytes;
    int multiprocessors;
};

struct CudaDevices {
    int driver, runtime;  // versions as CUDA numbers them: 13000 is 13.0; driver 0: none
    std::string reason;   // why `devices` is empty, or ""
    std::vector<CudaDevice> devices;
};

CudaDevices cuda_devices();

}  // namespace mmq
