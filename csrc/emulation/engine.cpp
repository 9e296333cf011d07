// Launches: blocks of fibers, of which one runs until it must wait.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>

#include "state.h"

namespace mmq::emulation {

Engine engine;

std::string where(const Thread& thread) {
    const Block& block = *thread.block;
    return engine.kernel + ", block " + std::to_string(block.number) + " thread " +
           std::to_string(thread.number);
}

namespace {

void enter_thread() {
    engine.body(engine.closure);
    Thread& thread = *engine.current;
    thread.state = State::kDone;
    ++thread.block->done;
    switch_fiber(thread.fiber.context, engine.scheduler);
}

void start_block(Block& block, int number, size_t first_stack, size_t shared_bytes) {
    const unsigned n = static_cast<unsigned>(number);
    block.index = {n % engine.grid.x, n / engine.grid.x % engine.grid.y, n / (engine.grid.x * engine.grid.y)};
    block.number = number;
    const size_t count = engine.block.x * engine.block.y * engine.block.z;
    block.threads = std::vector<Thread>(count);
    block.warps = std::vector<Warp>((count + kWarp - 1) / kWarp);
    std::free(block.shared);
    block.shared_bytes = shared_bytes;
    block.shared = static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + 2047) / 1024 * 1024));
    std::memset(block.shared, 0xFF, shared_bytes);
    block.cells.assign(shared_bytes, Cell{});
    block.seen.assign(engine.grid.x * engine.grid.y * engine.grid.z, 0);
    block.acquired = block.seen;
    block.epoch = 0;
    block.at_barrier = block.done = 0;
    for (size_t i = 0; i < count; ++i) {
        Thread& thread = block.threads[i];
        thread.block = &block;
        thread.number = static_cast<int>(i);
        prepare_fiber(thread.fiber, *engine.stacks[first_stack + i], &enter_thread);
    }
}

// The next thread to run under the policy; null when none can.
Thread* next_thread(std::vector<Block>& resident, const std::vector<size_t>& priority) {
    const bool backward = engine.settings.policy == Policy::kReverse;
    for (size_t place : priority) {
        const size_t warps = resident[0].warps.size();
        Block& block = resident[place / warps];
        const size_t first = place % warps * kWarp, last = std::min(first + kWarp, block.threads.size());
        if (block.done == static_cast<int>(block.threads.size())) continue;
        for (size_t i = first; i < last; ++i) {
            Thread& thread = block.threads[backward ? last - 1 - (i - first) : i];
            if (thread.state == State::kReady) return &thread;
        }
    }
    return nullptr;
}

std::string stuck(const std::vector<Block>& resident) {
    std::string text = "nothing can run:";
    int told = 0;
    for (const Block& block : resident) {
        Place last;
        for (const Thread& thread : block.threads) {
            if (thread.state != State::kWaiting || thread.waits_for == last || ++told > 6) continue;
            last = thread.waits_for;
            text += " [" + where(thread) + " waits for " + last.text() + "]";
        }
    }
    return text;
}

void run_blocks(size_t shared_bytes) {
    std::mt19937_64 random(engine.settings.seed);
    const int blocks = static_cast<int>(engine.grid.x * engine.grid.y * engine.grid.z);
    const size_t threads = engine.block.x * engine.block.y * engine.block.z;
    std::vector<int> order(static_cast<size_t>(blocks));
    for (int i = 0; i < blocks; ++i) order[static_cast<size_t>(i)] = i;
    if (engine.settings.policy == Policy::kReverse) std::reverse(order.begin(), order.end());
    if (engine.settings.policy == Policy::kRunAhead) std::shuffle(order.begin(), order.end(), random);
    std::vector<Block> resident(
        static_cast<size_t>(std::max(1, std::min(blocks, engine.settings.resident_blocks))));
    while (engine.stacks.size() < resident.size() * threads)
        engine.stacks.push_back(std::make_unique<FiberStack>());
    size_t started = 0;
    for (size_t i = 0; i < resident.size(); ++i)
        start_block(resident[i], order[started++], i * threads, shared_bytes);
    std::vector<size_t> priority(resident.size() * resident[0].warps.size());
    for (size_t i = 0; i < priority.size(); ++i) priority[i] = i;
    if (engine.settings.policy == Policy::kReverse) std::reverse(priority.begin(), priority.end());
    if (engine.settings.policy == Policy::kRunAhead) std::shuffle(priority.begin(), priority.end(), random);
    int running = static_cast<int>(resident.size());
    while (running > 0 && engine.failure.empty()) {
        Thread* thread = next_thread(resident, priority);
        if (thread == nullptr) {
            engine.failure = stuck(resident);
            break;
        }
        engine.current = thread;
        switch_fiber(engine.scheduler, thread->fiber.context);
        engine.current = nullptr;
        Block& block = *thread->block;
        if (block.done == static_cast<int>(block.threads.size())) {
            if (started < order.size()) {
                start_block(block, order[started++], static_cast<size_t>(&block - resident.data()) * threads,
                            shared_bytes);
            } else {
                --running;
            }
        }
    }
    for (Block& block : resident) std::free(block.shared);
}

}  // namespace

Settings& settings() {
    return engine.settings;
}

void fail(const std::string& what) {
    if (engine.current == nullptr) throw std::runtime_error(engine.kernel + ": " + what);
    engine.failure = what + " (" + where(*engine.current) + ")";
    // The fiber is never resumed: its stack is dropped, not unwound.
    switch_fiber(engine.current->fiber.context, engine.scheduler);
    std::abort();
}

Index3 thread_index() {
    const unsigned n = static_cast<unsigned>(engine.current->number);
    return {n % engine.block.x, n / engine.block.x % engine.block.y, n / (engine.block.x * engine.block.y)};
}

Index3 block_index() {
    return engine.current->block->index;
}

Index3 block_size() {
    return engine.block;
}

Index3 grid_size() {
    return engine.grid;
}

void* dynamic_shared() {
    return engine.current->block->shared;
}

void launch(const char* name, Index3 grid, Index3 block, size_t shared_bytes, void (*body)(const void*),
            const void* closure, size_t closure_bytes) {
    engine.kernel = name;
    engine.failure.clear();
    engine.atomics.clear();
    engine.body = body;
    engine.closure = static_cast<const char*>(closure);
    engine.closure_bytes = closure_bytes;
    engine.grid = grid;
    engine.block = block;
    if (shared_bytes > static_cast<size_t>(engine.settings.shared_limit))
        engine.failure = std::to_string(shared_bytes) + " bytes of shared memory asked for, " +
                         std::to_string(engine.settings.shared_limit) + " are there";
    if (block.x * block.y * block.z % kWarp != 0) engine.failure = "a block must be whole warps";
    if (engine.failure.empty()) run_blocks(shared_bytes);
    std::string failure = engine.failure;
    if (failure.empty()) {
        try {
            check_outputs();
        } catch (const std::runtime_error& error) {
            failure = error.what();
        }
    }
    engine.ranges.clear();
    if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace mmq::emulation
