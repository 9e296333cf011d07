// For sanitized builds, MMQ_CHECK_REGIONS: a loop that touches every number of a few regions has the regions checked before and
// is left alone, where else it would wait for the checks of its loads most of the time. What it calls has to be inlined, and
// to stay in registers: nothing clears what a scope that ends in such a function has poisoned. Elsewhere this is nothing.
#pragma once

#include <cstdint>

#if defined(MMQ_CHECK_REGIONS)
#include <sanitizer/asan_interface.h>
#define MMQ_REGIONS_CHECKED __attribute__((no_sanitize("address")))
#define MMQ_PART_OF_LOOP __attribute__((always_inline)) inline
#else
#define MMQ_REGIONS_CHECKED
#define MMQ_PART_OF_LOOP inline
#endif

namespace mmq {

// Stops the process, as a load of any of the numbers would, where one of them is not the program's.
inline void check_region([[maybe_unused]] const float* from, [[maybe_unused]] int64_t count) {
#if defined(MMQ_CHECK_REGIONS)
    const void* bad =
        __asan_region_is_poisoned(const_cast<float*>(from), static_cast<size_t>(count) * sizeof(float));
    if (bad != nullptr) static_cast<void>(*static_cast<const volatile char*>(bad));
#endif
}

}  // namespace mmq
