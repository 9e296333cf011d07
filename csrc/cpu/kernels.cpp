// Choice of the instruction set at run time.
#include "kernels.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>

// How many instruction sets beyond the scalar one are compiled, from the plainest on: setup.py's MMQ_CPU_UP_TO.
#if !defined(__x86_64__)
#define MMQ_BEYOND_SCALAR 0
#elif !defined(MMQ_BEYOND_SCALAR)
#define MMQ_BEYOND_SCALAR 4
#endif

namespace mmq {
namespace {

#define MMQ_KERNELS(ISA) \
    {#ISA,               \
     gemm_##ISA,         \
     dequantize_##ISA,   \
     quantize_rtn_##ISA, \
     gptq_block_##ISA,   \
     search_grid_##ISA,  \
     descend_##ISA,      \
     gemm_integer_##ISA}

// From the plainest on, each for machines that also run those before it.
constexpr Kernels kKernels[] = {
    MMQ_KERNELS(scalar),
#if MMQ_BEYOND_SCALAR >= 1
    MMQ_KERNELS(avx2),
#endif
#if MMQ_BEYOND_SCALAR >= 2
    MMQ_KERNELS(avx512),
#endif
// Float activations have no use for VNNI, and quantizers none for either.
#if MMQ_BEYOND_SCALAR >= 3
    {"avx512_vnni", gemm_avx512, dequantize_avx512, quantize_rtn_avx512, gptq_block_avx512,
     search_grid_avx512, descend_avx512, gemm_integer_avx512_vnni},
#endif
#if MMQ_BEYOND_SCALAR >= 4
    {"avx512_bf16", gemm_avx512_bf16, dequantize_avx512, quantize_rtn_avx512, gptq_block_avx512,
     search_grid_avx512, descend_avx512, gemm_integer_avx512_vnni},
#endif
};
#undef MMQ_KERNELS

#if defined(MMQ_EMULATE_AVX512)
#define MMQ_HAS(FEATURE) true
#else
#define MMQ_HAS(FEATURE) (__builtin_cpu_supports(FEATURE) != 0)
#endif

// Whether this machine, which runs those before, runs kKernels[i]. __builtin_cpu_supports also asks whether the system saves
// the wide registers.
bool runs(int i) {
#if defined(__x86_64__)
    switch (i) {
        case 1:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
        case 2:
            return MMQ_HAS("avx512f") && MMQ_HAS("avx512bw") && MMQ_HAS("avx512dq") && MMQ_HAS("avx512vl");
        case 3:
            return MMQ_HAS("avx512vnni");
        case 4:
            return MMQ_HAS("avx512bf16");
    }
#endif
    return i == 0;
}

int count_runnable() {
    int count = 0;
    while (count < static_cast<int>(std::size(kKernels)) && runs(count)) ++count;
    return count;
}

const Kernels& by_name(const std::string& name, const char* asker) {
    const int count = count_runnable();
    if (name.empty()) return kKernels[count - 1];
    for (int i = 0; i < count; ++i) {
        if (name == kKernels[i].isa) return kKernels[i];
    }
    throw std::invalid_argument(std::string(asker) + " must be one of " + runnable_isas() +
                                " on this machine, got '" + name + "'");
}

}  // namespace

std::string runnable_isas() {
    std::string names;
    for (int i = 0; i < count_runnable(); ++i) names += (i ? ", " : "") + std::string(kKernels[i].isa);
    return names;
}

const Kernels& kernels(const std::string& isa) {
    if (!isa.empty()) return by_name(isa, "isa");
    const char* asked = std::getenv("MMQ_CPU_ISA");
    return by_name(asked == nullptr ? "" : asked, "MMQ_CPU_ISA");
}

}  // namespace mmq
