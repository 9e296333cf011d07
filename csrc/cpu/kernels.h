// Entry points of the kernels that exist once per instruction set, and the choice among them.
#pragma once

#include <string>

#include "../common/args.h"

namespace mmq {

struct Kernels {
    const char* isa;
    void (*gemm)(const GemmArgs&);
    void (*dequantize)(const DequantizeArgs&);
    void (*quantize_rtn)(const RtnArgs&);
    void (*gptq_block)(const GptqArgs&);
    void (*search_grid)(const SearchArgs&);
    void (*descend)(const DescendArgs&);
    void (*gemm_integer)(const GemmArgs&);  // activations of 8 bits
};

#define MMQ_DECLARE_KERNELS(ISA)                  \
    void gemm_##ISA(const GemmArgs&);             \
    void dequantize_##ISA(const DequantizeArgs&); \
    void quantize_rtn_##ISA(const RtnArgs&);      \
    void gptq_block_##ISA(const GptqArgs&);       \
    void search_grid_##ISA(const SearchArgs&);    \
    void descend_##ISA(const DescendArgs&);       \
    void gemm_integer_##ISA(const GemmArgs&);

MMQ_DECLARE_KERNELS(scalar)
MMQ_DECLARE_KERNELS(avx2)
MMQ_DECLARE_KERNELS(avx512)
#undef MMQ_DECLARE_KERNELS
void gemm_avx512_bf16(const GemmArgs&);
void gemm_integer_avx512_vnni(const GemmArgs&);

// The kernels of an instruction set by name; "" means MMQ_CPU_ISA where it is set, else the best of this
// machine. Throws std::invalid_argument for a name that is unknown or that this machine cannot run.
const Kernels& kernels(const std::string& isa);

// Names of the instruction sets that this machine can run, best last.
std::string runnable_isas();

}  // namespace mmq
