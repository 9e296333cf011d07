// Stacks and the switch between them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace mmq::emulation {

// 64 KiB with a guard page below: an overflow is a fault, not a wrong result.
class FiberStack {
  public:
    static constexpr size_t kBytes = 64 * 1024, kGuard = 4096;

    FiberStack() {
        base_ = static_cast<char*>(
            mmap(nullptr, kBytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED) throw std::runtime_error("no memory for the stacks of emulated threads");
        mprotect(base_, kGuard, PROT_NONE);
    }
    ~FiberStack() { munmap(base_, kBytes + kGuard); }
    FiberStack(const FiberStack&) = delete;
    FiberStack& operator=(const FiberStack&) = delete;

    char* bottom() const { return base_ + kGuard; }
    char* top() const { return base_ + kGuard + kBytes; }
    bool holds(const char* p) const { return p >= bottom() && p < top(); }

  private:
    char* base_;
};

#if defined(__x86_64__)
struct FiberContext {
    void* stack_pointer = nullptr;
};
#else
struct FiberContext {
    ucontext_t context;
};
#endif

struct Fiber {
    FiberContext context;
    FiberStack* stack = nullptr;
};

// The fiber will run `entry`, which must never return.
void prepare_fiber(Fiber& fiber, FiberStack& stack, void (*entry)());

// Saves the running context in `from` and goes on with `to`.
void switch_fiber(FiberContext& from, FiberContext& to);

// Whether an address lies in the constants of a loaded library (tables that kernels may read).
bool is_constant(const char* address);

}  // namespace mmq::emulation
