// Choice of the instruction set at run time.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>

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

constexpr Kernels kScalar = MMQ_KERNELS(scalar);
#if defined(__x86_64__)
constexpr Kernels kAvx2 = MMQ_KERNELS(avx2);
constexpr Kernels kAvx512 = MMQ_KERNELS(avx512);
// Float activations have no use for VNNI, and quantizers none for either.
constexpr Kernels kAvx512Vnni = {
    "avx512_vnni",     gemm_avx512,        dequantize_avx512, quantize_rtn_avx512,
    gptq_block_avx512, search_grid_avx512, descend_avx512,    gemm_integer_avx512_vnni};
constexpr Kernels kAvx512Bf16 = {"avx512_bf16",       gemm_avx512_bf16,        dequantize_avx512,
                                 quantize_rtn_avx512, gptq_block_avx512,       search_grid_avx512,
                                 descend_avx512,      gemm_integer_avx512_vnni};
#endif
#undef MMQ_KERNELS

#if defined(MMQ_EMULATE_AVX512)
#define MMQ_HAS(FEATURE) true
#else
#define MMQ_HAS(FEATURE) (__builtin_cpu_supports(FEATURE) != 0)
#endif

constexpr int kMostIsas = 5;

// Kernels from the plainest on. __builtin_cpu_supports also asks whether the system saves the wide registers.
int runnable(const Kernels* (&found)[kMostIsas]) {
    int count = 0;
    found[count++] = &kScalar;
#if defined(__x86_64__)
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) found[count++] = &kAvx2;
    const bool avx512 =
        MMQ_HAS("avx512f") && MMQ_HAS("avx512bw") && MMQ_HAS("avx512dq") && MMQ_HAS("avx512vl");
    if (avx2 && avx512) found[count++] = &kAvx512;
    const bool vnni = MMQ_HAS("avx512vnni"), bf16 = MMQ_HAS("avx512bf16");
    if (avx2 && avx512 && vnni) found[count++] = &kAvx512Vnni;
    if (avx2 && avx512 && vnni && bf16) found[count++] = &kAvx512Bf16;
#endif
    return count;
}

const Kernels& by_name(const std::string& name, const char* asker) {
    const Kernels* found[kMostIsas];
    const int count = runnable(found);
    if (name.empty()) return *found[count - 1];
    for (int i = 0; i < count; ++i) {
        if (name == found[i]->isa) return *found[i];
    }
    throw std::invalid_argument(std::string(asker) + " must be one of " + runnable_isas() +
                                " on this machine, got '" + name + "'");
}

}  // namespace

std::string runnable_isas() {
    const Kernels* found[kMostIsas];
    const int count = runnable(found);
    std::string names;
    for (int i = 0; i < count; ++i) names += (i ? ", " : "") + std::string(found[i]->isa);
    return names;
}

const Kernels& kernels(const std::string& isa) {
    if (!isa.empty()) return by_name(isa, "isa");
    const char* asked = std::getenv("MMQ_CPU_ISA");
    return by_name(asked == nullptr ? "" : asked, "MMQ_CPU_ISA");
}

}  // namespace mmq
