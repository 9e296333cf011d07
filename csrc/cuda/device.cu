// Device query. No driver, or no device, is an answer and not an error: the module must load anywhere.
#include "device.h"

#include <cuda_runtime_api.h>

namespace mmq {

CudaDevices cuda_devices() {
    CudaDevices found{};
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

}  // namespace mmq
