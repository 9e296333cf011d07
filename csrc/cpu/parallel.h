// One loop over OpenMP threads. The process already holds torch's pool (the same libgomp): this one is it.
#pragma once

#include <cstdint>

namespace mmq {

// body(i) for i in [0, count). Indices are handed out `chunk` at a time to whoever is free, so a body must
// write only what its index owns; results then do not depend on the number of threads. A body must not throw.
template <class Body>
void parallel_for(int threads, int64_t count, int64_t chunk, const Body& body) {
    if (threads <= 1 || count <= chunk) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
    for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace mmq
