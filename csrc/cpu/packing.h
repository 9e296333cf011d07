// Codes <-> stream words <-> cpu layout (common/layout.h). Plain integer loops for every machine.
#pragma once

#include <cstdint>

#include "../common/args.h"

namespace mmq {

void pack(const PackArgs& args, const uint8_t* codes, int32_t* words);
void unpack(const PackArgs& args, const int32_t* words, uint8_t* codes);
void prepack(const PackArgs& args, const int32_t* words, int32_t* tiles);
void unprepack(const PackArgs& args, const int32_t* tiles, int32_t* words);

}  // namespace mmq
