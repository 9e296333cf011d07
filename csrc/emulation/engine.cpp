#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>

#include "fiber.h"
#include "memory.h"

namespace mmq::emulation {
namespace {

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

Engine engine;

void wait(const Place& place) {
    engine.current->state = State::kWaiting;
    engine.current->waits_for = place;
    switch_fiber(engine.current->fiber.context, engine.scheduler);
}

void yield() {
    switch_fiber(engine.current->fiber.context, engine.scheduler);
}

std::string where(const Thread& thread) {
    const Block& block = *thread.block;
    return engine.kernel + ", block " + std::to_string(block.number) + " thread " +
           std::to_string(thread.number);
}

Moment now() {
    const Thread& thread = *engine.current;
    const Block& block = *thread.block;
    return {block.number, thread.number, block.epoch,
            block.warps[static_cast<size_t>(thread.number / kWarp)].epoch};
}

const Clock& seen() {
    return engine.current->acquired ? engine.current->block->acquired : engine.current->block->seen;
}

void merge(Clock& into, const Clock& from) {
    if (into.size() < from.size()) into.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// `what` says where, and is asked only if there is a problem.
template <class Text>
void require(const std::string& problem, Text what) {
    if (!problem.empty()) fail(problem + ": " + what());
}

void enter_thread() {
    engine.body(engine.closure);
    Thread& thread = *engine.current;
    thread.state = State::kDone;
    ++thread.block->done;
    switch_fiber(thread.fiber.context, engine.scheduler);
}

// --- memory ---

Cell* shared_cell(const char* address, size_t bytes) {
    Block& block = *engine.current->block;
    if (address < block.shared || address >= block.shared + block.shared_bytes) return nullptr;
    if (address + bytes > block.shared + block.shared_bytes)
        fail("access across the end of shared memory (" + std::to_string(block.shared_bytes) + " bytes)");
    return &block.cells[static_cast<size_t>(address - block.shared)];
}

Range* range_of(const char* address, size_t bytes) {
    for (Range& range : engine.ranges) {
        if (address < range.begin || address >= range.begin + range.bytes) continue;
        if (address + bytes > range.begin + range.bytes) fail("access across the end of a global buffer");
        return &range;
    }
    return nullptr;
}

std::string distance(const char* address) {
    std::string text = "nothing near";
    int64_t best = 1 << 16;
    for (const Range& range : engine.ranges) {
        const int64_t off = address - range.begin, past = off - static_cast<int64_t>(range.bytes);
        if (std::abs(off) < best)
            best = std::abs(off), text = std::to_string(off) + " bytes from a buffer's begin";
        if (std::abs(past) < best)
            best = std::abs(past), text = std::to_string(past) + " bytes past a buffer's end";
    }
    return text;
}

std::string check(Cell* cell, int bytes, bool write) {
    return write ? check_write(cell, bytes, now(), seen()) : check_read(cell, bytes, now(), seen());
}

// What is asked first is what kernels read most; the constants of libraries are asked last, as that takes long.
void check_access(const char* address, int bytes, bool write) {
    if (Cell* cell = shared_cell(address, static_cast<size_t>(bytes))) {
        return require(check(cell, bytes, write), [&] {
            return "shared byte " + std::to_string(address - engine.current->block->shared);
        });
    }
    Range* range = range_of(address, static_cast<size_t>(bytes));
    if (range == nullptr) {
        if (!write && is_constant(address)) return;
        fail(std::string("out of bounds ") + (write ? "write: " : "read: ") + distance(address));
    }
    if (range->access == Access::kInput) {
        if (write) fail("write to an input");
        return;
    }
    require(check(&range->cells[static_cast<size_t>(address - range->begin)], bytes, write), [&] {
        return "global byte " + std::to_string(address - range->begin) + " of a buffer of " +
               std::to_string(range->bytes);
    });
}

void land(const Copy& copy) {
    if (copy.from) {
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    } else {
        std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    }
    Cell* cell = shared_cell(copy.to, static_cast<size_t>(copy.bytes));
    for (int i = 0; i < copy.bytes; ++i) cell[i].in_flight = false;
    require(check_write(cell, copy.bytes, now(), seen()), [] { return "landing of a copy"; });
}

// --- launching ---

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

void check_outputs() {
    for (const Range& range : engine.ranges) {
        if (range.access != Access::kOutput) continue;
        for (size_t i = 0; i < range.bytes; ++i) {
            if (!range.cells[i].initialized)
                fail("byte " + std::to_string(i) + " of an output of " + std::to_string(range.bytes) +
                     " was never written");
        }
    }
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

void block_barrier(const char* file, int line) {
    Block& block = *engine.current->block;
    const Place place{"__syncthreads", file, line};
    if (block.done > 0)
        fail(place.text() + ", but " + std::to_string(block.done) + " threads of the block have exited");
    if (block.at_barrier > 0 && !(block.barrier == place))
        fail(place.text() + " while others are at " + block.barrier.text());
    block.barrier = place;
    if (++block.at_barrier < static_cast<int>(block.threads.size())) return wait(place);
    block.at_barrier = 0;
    ++block.epoch;
    merge(block.seen, block.acquired);
    for (Thread& thread : block.threads) {
        thread.state = State::kReady;
        thread.acquired = false;
    }
    yield();
}

namespace {

// Without anything to compute it is a __syncwarp, which orders memory.
void meet(const Place& place, const void* in, size_t in_bytes, void* out, size_t out_bytes, Compute compute) {
    Thread& thread = *engine.current;
    Block& block = *thread.block;
    Warp& warp = block.warps[static_cast<size_t>(thread.number / kWarp)];
    const size_t lane = static_cast<size_t>(thread.number % kWarp);
    if (warp.arrived != 0 && !(warp.place == place))
        fail(place.text() + " while other lanes are at " + warp.place.text());
    warp.place = place;
    if (in_bytes) std::memcpy(warp.in + lane * in_bytes, in, in_bytes);
    warp.arrived |= 1u << lane;
    if (warp.arrived != 0xFFFFFFFFu) {
        wait(place);
    } else {
        warp.arrived = 0;
        if (compute) {
            compute(warp.in, warp.out);
        } else {
            ++warp.epoch;
        }
        const size_t first = static_cast<size_t>(thread.number) - lane;
        for (size_t i = 0; i < kWarp; ++i) block.threads[first + i].state = State::kReady;
    }
    if (out_bytes) std::memcpy(out, warp.out + lane * out_bytes, out_bytes);
}

}  // namespace

void collective(const char* what, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                Compute compute) {
    meet({what, "", 0}, in, in_bytes, out, out_bytes, compute);
}

void warp_barrier(unsigned mask, const char* file, int line) {
    if (mask != 0xFFFFFFFFu) fail("__syncwarp of a part of a warp");
    meet({"__syncwarp", file, line}, nullptr, 0, nullptr, 0, nullptr);
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
    char* to = static_cast<char*>(shared);
    const char* from = static_cast<const char*>(global);
    if (reinterpret_cast<uintptr_t>(to) % static_cast<size_t>(bytes) != 0)
        fail("cp.async to an unaligned address");
    Cell* cell = shared_cell(to, static_cast<size_t>(bytes));
    if (cell == nullptr) fail("cp.async to an address outside of shared memory");
    require(check_write(cell, bytes, now(), seen()), [] { return "cp.async"; });
    for (int i = 0; i < bytes; ++i) cell[i].in_flight = true;
    std::memset(to, 0xFF, static_cast<size_t>(bytes));
    if (valid) {
        if (reinterpret_cast<uintptr_t>(from) % static_cast<size_t>(bytes) != 0)
            fail("cp.async of an unaligned address");
        const Range* range = range_of(from, static_cast<size_t>(bytes));
        if (range == nullptr) fail("cp.async out of bounds: " + distance(from));
        if (range->access != Access::kInput) fail("cp.async of a buffer that is not an input");
    }
    engine.current->open_copies.push_back({to, valid ? from : nullptr, bytes});
}

void commit_copies() {
    engine.current->committed.push_back(std::move(engine.current->open_copies));
    engine.current->open_copies.clear();
}

void wait_copies(int newest_left) {
    auto& committed = engine.current->committed;
    while (static_cast<int>(committed.size()) > newest_left) {
        for (const Copy& copy : committed.front()) land(copy);
        committed.pop_front();
    }
}

uint32_t atomic_add(uint32_t* address, uint32_t value) {
    yield();  // before the clock is looked at, never inside
    Thread& thread = *engine.current;
    Block& block = *thread.block;
    Range* range = range_of(reinterpret_cast<const char*>(address), 4);
    if (range == nullptr || range->access != Access::kCounters) fail("atomic outside of the counters");
    Cell* cell = &range->cells[static_cast<size_t>(reinterpret_cast<const char*>(address) - range->begin)];
    merge(block.acquired, seen());
    thread.acquired = true;
    Clock& published = engine.atomics[address];
    merge(block.acquired, published);
    require(check_write(cell, 4, now(), block.acquired, true), [] { return "atomic"; });
    merge(published, block.acquired);
    published[static_cast<size_t>(block.number)] =
        std::max(published[static_cast<size_t>(block.number)], block.epoch);
    const uint32_t before = *address;
    *address = before + value;
    return before;
}

void read_shared_for_lane(int lane, const void* shared, int bytes, void* out) {
    Block& block = *engine.current->block;
    const int first = engine.current->number / kWarp * kWarp;
    const char* from = static_cast<const char*>(shared);
    if (reinterpret_cast<uintptr_t>(from) % static_cast<size_t>(bytes) != 0)
        fail("ldmatrix of an unaligned row");
    Cell* cell = shared_cell(from, static_cast<size_t>(bytes));
    if (cell == nullptr) fail("ldmatrix outside of shared memory");
    Moment moment = now();
    moment.thread = first + lane;
    require(check_read(cell, bytes, moment, block.seen),
            [&] { return "ldmatrix, shared byte " + std::to_string(from - block.shared); });
    std::memcpy(out, from, static_cast<size_t>(bytes));
}

void track(const void* address, size_t bytes, Access access) {
    if (address == nullptr || bytes == 0) return;
    Range range{static_cast<const char*>(address), bytes, access, {}};
    if (access != Access::kInput) {
        Cell fresh;
        fresh.initialized = access == Access::kCounters;
        range.cells.assign(bytes, fresh);
    }
    engine.ranges.push_back(std::move(range));
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

// --- what hooks.cpp calls ---

void on_access(const void* address, int bytes, bool write) {
    if (engine.current == nullptr) return;
    const char* p = static_cast<const char*>(address);
    if (engine.current->fiber.stack->holds(p)) return;
    if (!write && p >= engine.closure && p + bytes <= engine.closure + engine.closure_bytes) return;
    check_access(p, bytes, write);
}

}  // namespace mmq::emulation
