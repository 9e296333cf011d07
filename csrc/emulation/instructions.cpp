// What threads do together: they meet at barriers and in warps, copy asynchronously, and add atomically.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace mmq::emulation {
namespace {

void wait(const Place& place) {
    engine.current->state = State::kWaiting;
    engine.current->waits_for = place;
    switch_fiber(engine.current->fiber.context, engine.scheduler);
}

void yield() {
    switch_fiber(engine.current->fiber.context, engine.scheduler);
}

void merge(Clock& into, const Clock& from) {
    if (into.size() < from.size()) into.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
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

}  // namespace mmq::emulation
