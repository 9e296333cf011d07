// The tensors of a weight, for the emulation to watch.
#pragma once

#include "args.h"
#include "layout.cuh"
#include "platform.cuh"

namespace mmq::cuda {

inline void track_weight(const Weight& weight) {
    [[maybe_unused]] const int64_t groups = ceil_div(weight.k, weight.group_size),
                                   tiles = tile_count(weight.n);
    MMQ_TRACK(weight.tiles, tiles * tile_count(weight.k) * weight.bits * 512, kInput);
    MMQ_TRACK(weight.scale, groups * tiles * kTileSide * (weight.scale_dtype == Dtype::kFloat32 ? 4 : 2),
              kInput);
    MMQ_TRACK(weight.zero, groups * tiles * 8 * weight.bits, kInput);
}

}  // namespace mmq::cuda
