// How fast this CPU multiplies and adds when nothing else is asked of it: what benchmarks are held against.
#pragma once

#include <cstdint>

namespace mmq {

enum class Peak : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// Runs `rounds` rounds of independent multiply-adds between registers on each thread; returns how many were done in all,
// 0 where this CPU has no instruction for the kind.
int64_t multiply_adds(Peak kind, int64_t rounds, int threads);

}  // namespace mmq
