// Each load and store of a kernel, against the memory that its launch may touch.
#include <cstdlib>

#include "state.h"

namespace mmq::emulation {

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

namespace {

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

}  // namespace

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

// What hooks.cpp calls.
void on_access(const void* address, int bytes, bool write) {
    if (engine.current == nullptr) return;
    const char* p = static_cast<const char*>(address);
    if (engine.current->fiber.stack->holds(p)) return;
    if (!write && p >= engine.closure && p + bytes <= engine.closure + engine.closure_bytes) return;
    check_access(p, bytes, write);
}

}  // namespace mmq::emulation
