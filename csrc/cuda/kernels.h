// What csrc/cuda offers to bindings. Every function launches on `target` and returns at once; empty inputs launch
// nothing. They throw std::runtime_error where CUDA refuses, std::invalid_argument for what no kernel serves.
#pragma once

#include <string>
#include <vector>

#include "args.h"
#include "gemm_plan.h"

namespace mmq::cuda {

void gemm(const GemmArgs& args, Target target);
void dequantize(const DequantizeArgs& args, Target target);
void pack(const PackArgs& args, Target target);        // codes -> words
void unpack(const PackArgs& args, Target target);      // words -> codes
void prepack(const PrepackArgs& args, Target target);  // words -> tiles
void unprepack(const PrepackArgs& args, Target target);
void quantize_rtn(const RtnArgs& args, Target target);
void gptq_block(const GptqBatch& args, Target target);
void search_grid(const SearchArgs& args, Target target);
void descend(const DescendArgs& args, Target target);

// Columns that one launch of gptq_block or descend takes.
constexpr int kGptqColumns = 128;

// One instruction of ptx.cuh on each of 32 lanes: in and out are uint32 [32, 8] and [32, 4]; see probe.cu.
void probe(const std::string& instruction, const uint32_t* in, uint32_t* out, Target target);
std::vector<std::string> probe_names();

}  // namespace mmq::cuda
