// Launching a kernel: on the right device and stream, with the shared memory it asks for, and with its error checked.
#pragma once

#include "args.h"
#include "device.h"
#include "platform.cuh"

#include <type_traits>

#ifndef MMQ_EMULATE
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#endif

namespace mmq::cuda {

// Calls a function with the width as a compile-time constant.
template <class Function>
void with_bits(int bits, const Function& function) {
    switch (bits) {
        case 2:
            return function(std::integral_constant<int, 2>{});
        case 3:
            return function(std::integral_constant<int, 3>{});
        case 4:
            return function(std::integral_constant<int, 4>{});
        case 5:
            return function(std::integral_constant<int, 5>{});
        case 6:
            return function(std::integral_constant<int, 6>{});
        case 7:
            return function(std::integral_constant<int, 7>{});
        default:
            return function(std::integral_constant<int, 8>{});
    }
}

constexpr int kDefaultShared = 48 * 1024;  // bytes a kernel may use without asking

#ifdef MMQ_EMULATE

template <class Args>
void launch(const char* name, void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, Target,
            const Args& args) {
    emulation::launch_kernel(name, kernel, grid, dim3(static_cast<unsigned>(threads)),
                             static_cast<size_t>(shared_bytes), args);
}

#else

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error that was told is not left behind for the next call to find
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current, and the one before it again at the end.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "current device");
        if (before_ == device) return;
        check(cudaSetDevice(device), "choice of a device");
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// Lets a kernel use all shared memory that a block may have; once for each kernel and device.
inline void allow_shared(const void* kernel, int device) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int> > allowed;
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({kernel, device})) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               device_limits(device).shared_per_block),
          "shared memory of a kernel");
    allowed.insert({kernel, device});
}

template <class Args>
void launch(const char* name, void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, Target target,
            const Args& args) {
    const DeviceGuard guard(target.device);
    if (shared_bytes > kDefaultShared) allow_shared(reinterpret_cast<const void*>(kernel), target.device);
    void* parameters[] = {const_cast<Args*>(&args)};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(threads)),
                           parameters, static_cast<size_t>(shared_bytes),
                           static_cast<cudaStream_t>(target.stream)),
          name);
}

#endif

}  // namespace mmq::cuda
