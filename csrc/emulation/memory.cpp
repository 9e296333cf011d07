#include "memory.h"

namespace mmq::emulation {
namespace {

std::string name(const Moment& moment) {
    return "block " + std::to_string(moment.block) + " thread " + std::to_string(moment.thread);
}

// Whether what happened at `then` comes before everything at `now`. An atomic publishes the epochs before it and itself.
bool ordered(const Moment& then, const Moment& now, const Clock& seen, bool atomic = false) {
    if (then.block < 0) return true;
    if (then.block != now.block) return then.epoch < seen[static_cast<size_t>(then.block)] + (atomic ? 1 : 0);
    if (then.thread == now.thread || then.epoch < now.epoch) return true;
    return then.thread / 32 == now.thread / 32 && then.warp_epoch < now.warp_epoch;
}

}  // namespace

std::string check_read(Cell* cell, int bytes, const Moment& now, const Clock& seen) {
    for (int i = 0; i < bytes; ++i, ++cell) {
        if (cell->in_flight) return "read of data in flight, copied by " + name(cell->writer);
        if (!cell->initialized) return "read of uninitialized memory";
        if (!ordered(cell->writer, now, seen, cell->atomic))
            return "race: read of what " + name(cell->writer) + " wrote";
        const Moment& last = cell->reader;
        const bool same = last.block == now.block && last.epoch == now.epoch && last.thread != now.thread;
        // Lanes of one warp count as one reader, that of the warp's latest moment.
        cell->many_readers = same && (cell->many_readers || last.thread / 32 != now.thread / 32);
        cell->reader = now;
    }
    return {};
}

std::string check_write(Cell* cell, int bytes, const Moment& now, const Clock& seen, bool atomic) {
    for (int i = 0; i < bytes; ++i, ++cell) {
        if (cell->in_flight && cell->writer.thread != now.thread)
            return "write over a copy in flight of " + name(cell->writer);
        if (!(atomic && cell->atomic) && !ordered(cell->writer, now, seen, cell->atomic))
            return "race: write over what " + name(cell->writer) + " wrote";
        const bool others = cell->many_readers && cell->reader.epoch == now.epoch;
        if (!(atomic && cell->atomic) && (others || !ordered(cell->reader, now, seen)))
            return "race: write over what " + name(cell->reader) + " reads";
        cell->writer = now;
        cell->reader = Moment{};
        cell->many_readers = false;
        cell->initialized = true;
        cell->in_flight = false;
        cell->atomic = atomic;
    }
    return {};
}

}  // namespace mmq::emulation
