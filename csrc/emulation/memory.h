// Shadow memory: who wrote and read each byte of shared and tracked global memory, and whether that was ordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine.h"

namespace mmq::emulation {

// The moment of an access. Threads of a block are ordered by its barriers (`epoch`), lanes of a warp by
// __syncwarp (`warp_epoch`) too, blocks only through atomics (`Clock`).
struct Moment {
    int block = -1, thread = -1;
    uint32_t epoch = 0, warp_epoch = 0;
};

// For each block, the first of its epochs that is not known to have passed.
using Clock = std::vector<uint32_t>;

struct Cell {
    Moment writer, reader;
    bool initialized = false, in_flight = false, atomic = false, many_readers = false;
};

struct Range {
    const char* begin;
    size_t bytes;
    Access access;
    std::vector<Cell> cells;  // none for inputs
};

// An empty string, or what is wrong with an access at `now` to `bytes` cells from `cell` on.
std::string check_read(Cell* cell, int bytes, const Moment& now, const Clock& seen);
std::string check_write(Cell* cell, int bytes, const Moment& now, const Clock& seen, bool atomic = false);

}  // namespace mmq::emulation
