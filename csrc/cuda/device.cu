// Device query. No driver, or no device, is an answer and not an error: the module must load anywhere.
#include "device.h"

#include <map>
#include <mutex>

#include "runtime.cuh"

namespace mmq::cuda {

Devices devices() {
    Devices found{};
    cudaRuntimeGetVersion(&found.runtime);
    cudaDriverGetVersion(&found.driver);
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        cudaGetLastError();  // leaves no error behind for torch to find
        found.reason = cudaGetErrorString(status);
        return found;
    }
    if (count == 0) found.reason = "no device";
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp device{};
        if (cudaGetDeviceProperties(&device, i) != cudaSuccess) continue;
        found.devices.push_back({device.name, device.major, device.minor,
                                 static_cast<int64_t>(device.totalGlobalMem), device.multiProcessorCount});
    }
    return found;
}

const DeviceLimits& device_limits(int device) {
    static std::mutex mutex;
    static std::map<int, DeviceLimits> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    DeviceLimits limits{};
    check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "device query");
    check(cudaDeviceGetAttribute(&limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "device query");
    check(cudaDeviceGetAttribute(&limits.shared_per_multiprocessor,
                                 cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          "device query");
    return known.emplace(device, limits).first->second;
}

}  // namespace mmq::cuda
