// What the parts of the engine share: the launch that runs, its blocks and threads, and who runs now.
//
//   engine.cpp        launches: which thread runs next, and when nothing can
//   instructions.cpp  what threads wait for, hand each other and copy
//   access.cpp        each load and store, against what a launch may touch
#pragma once

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "fiber.h"
#include "memory.h"

namespace mmq::emulation {

constexpr int kWarp = 32;
constexpr size_t kOperandBytes = 64;

struct Copy {
    char* to;
    const char* from;  // null: zeros
    int bytes;
};

enum class State { kReady, kWaiting, kDone };

// A synchronizing instruction: its name, and where it stands in the sources (line 0: not said).
struct Place {
    const char* what = "";
    const char* file = "";
    int line = 0;

    bool operator==(const Place& other) const {
        return line == other.line && std::strcmp(what, other.what) == 0 && std::strcmp(file, other.file) == 0;
    }
    std::string text() const {
        return line ? std::string(what) + " at " + file + ":" + std::to_string(line) : std::string(what);
    }
};

struct Block;

struct Thread {
    Fiber fiber;
    State state = State::kReady;
    Place waits_for;
    Block* block = nullptr;
    int number = 0;
    bool acquired = false;  // has seen, by an atomic, what other threads of its block have not
    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> committed;
};

struct Warp {
    uint32_t arrived = 0;
    uint32_t epoch = 0;
    Place place;
    alignas(16) unsigned char in[kWarp * kOperandBytes];
    alignas(16) unsigned char out[kWarp * kOperandBytes];
};

struct Block {
    Index3 index;
    int number = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<Cell> cells;
    Clock seen, acquired;
    uint32_t epoch = 0;
    int at_barrier = 0, done = 0;
    Place barrier;
};

struct Engine {
    Settings settings;
    std::vector<Range> ranges;  // of the next or running launch
    std::map<const void*, Clock> atomics;
    std::string failure;
    Thread* current = nullptr;
    FiberContext scheduler;
    std::vector<std::unique_ptr<FiberStack>> stacks;
    void (*body)(const void*) = nullptr;
    const char* closure = nullptr;
    size_t closure_bytes = 0;
    Index3 grid, block;
    std::string kernel;
};

extern Engine engine;

// Of the running thread, asked at every access: its moment, and what it knows of other blocks.
inline Moment now() {
    const Thread& thread = *engine.current;
    const Block& block = *thread.block;
    return {block.number, thread.number, block.epoch,
            block.warps[static_cast<size_t>(thread.number / kWarp)].epoch};
}

inline const Clock& seen() {
    return engine.current->acquired ? engine.current->block->acquired : engine.current->block->seen;
}

// --- engine.cpp ---

std::string where(const Thread& thread);

// --- access.cpp ---

// The cells of shared memory at an address, or null; of a global buffer, or null. Both fail where an access crosses the end.
Cell* shared_cell(const char* address, size_t bytes);
Range* range_of(const char* address, size_t bytes);

// How far an address is from the buffers there are.
std::string distance(const char* address);

// Fails where a byte of an output was never written.
void check_outputs();

// `what` says where, and is asked only if there is a problem.
template <class Text>
void require(const std::string& problem, Text what) {
    if (!problem.empty()) fail(problem + ": " + what());
}

}  // namespace mmq::emulation
