// Executes CUDA kernels on the CPU: one fiber a thread, several blocks resident at once, and every access to memory
// checked. Test code: it is built by the test suite beside the unchanged sources of csrc/cuda, never into the wheel.
//
//   launch ──> blocks of fibers; the scheduler resumes one fiber, which runs until it must wait:
//              block_barrier, warp_barrier, collective (mma, ldmatrix, shuffle), atomics
//   hooks.cpp  the compiler reports each load and store; memory.h says whether it was allowed
//
// Idea: "-fsanitize=thread" without its runtime gives the hooks; schedules that are unkind on purpose (reverse,
// run-ahead) and copies that land as late as they may bring out what a barrier should have ordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mmq::emulation {

struct Index3 {
    unsigned x = 0, y = 1, z = 1;
};

enum class Policy : int { kInOrder = 0, kReverse = 1, kRunAhead = 2 };

// What a launch may do with a range of global memory.
enum class Access : int {
    kInput = 0,      // read only
    kOutput = 1,     // not initialized; every byte must have been written at the end
    kWorkspace = 2,  // not initialized; may stay so
    kCounters = 3,   // initialized, read and written
};

struct Settings {
    Policy policy = Policy::kInOrder;
    uint64_t seed = 0;
    int resident_blocks = 3;
    int multiprocessors = 2;
    int shared_limit = 99 * 1024;
};

Settings& settings();

// --- what kernels call, through platform.cuh and ptx.cuh ---

Index3 thread_index();
Index3 block_index();
Index3 block_size();
Index3 grid_size();
void* dynamic_shared();
void block_barrier(const char* file, int line);
void warp_barrier(unsigned mask, const char* file, int line);

// All lanes of the warp hand in `in_bytes` and get back `out_bytes`; `compute` sees both as arrays of 32 and runs once.
// Orders no memory. Lanes that exited read as 0xFF.
using Compute = void (*)(const void* in, void* out);
void collective(const char* what, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                Compute compute);

// Global -> shared, asynchronously: the destination is garbage until the group it is committed to was waited for.
// `valid` false fills with zeros.
void copy_async(void* shared, const void* global, int bytes, bool valid);
void commit_copies();
void wait_copies(int newest_left);

uint32_t atomic_add(uint32_t* address, uint32_t value);

// A read of shared memory by hardware on behalf of lane `lane` of the running warp.
void read_shared_for_lane(int lane, const void* shared, int bytes, void* out);

[[noreturn]] void fail(const std::string& what);

// --- what launchers call ---

void track(const void* address, size_t bytes, Access access);
// `body` runs in every thread, on the closure, which it may read.
void launch(const char* name, Index3 grid, Index3 block, size_t shared_bytes, void (*body)(const void*),
            const void* closure, size_t closure_bytes);

}  // namespace mmq::emulation
