// What GPUs are here, as plain facts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mmq::cuda {

struct DeviceInfo {
    std::string name;
    int major, minor;  // compute capability
    int64_t memory_bytes;
    int multiprocessors;
};

struct Devices {
    int driver, runtime;  // versions as CUDA numbers them: 13000 is 13.0; driver 0: none
    std::string reason;   // why `devices` is empty, or ""
    std::vector<DeviceInfo> devices;
};

Devices devices();

// What a launch must know of its GPU.
struct DeviceLimits {
    int multiprocessors;
    int shared_per_block;  // bytes, the most a block may ask for
    int shared_per_multiprocessor;
};

// Asked once for each device. Throws std::runtime_error where there is no such device.
const DeviceLimits& device_limits(int device);

}  // namespace mmq::cuda
