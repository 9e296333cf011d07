// Multiply-adds between registers. Twelve accumulators hide the latency of two instructions a cycle.
#include "peaks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.h"

namespace mmq {
namespace {

constexpr int kAccumulators = 12;

#if defined(__x86_64__)

// One function a kind: STEP of each accumulator, which the compiler must take for used each time, as it must take `a` for new.
#define MMQ_PEAK(NAME, TARGET, REGISTER, STEP)                                  \
    __attribute__((target(TARGET))) void NAME(int64_t rounds) {                 \
        REGISTER a = {}, b = {}, sum[kAccumulators] = {};                       \
        for (int64_t i = 0; i < rounds; ++i) {                                  \
            _Pragma("GCC unroll 12") for (int j = 0; j < kAccumulators; ++j) {  \
                sum[j] = STEP;                                                  \
                asm volatile("" : "+v"(a));                                     \
            }                                                                   \
            asm volatile("" : "+v"(b));                                         \
            _Pragma("GCC unroll 12") for (int j = 0; j < kAccumulators;         \
                                          ++j) asm volatile("" : "+v"(sum[j])); \
        }                                                                       \
    }

MMQ_PEAK(fma_avx2, "avx2,fma", __m256, _mm256_fmadd_ps(a, b, sum[j]))
MMQ_PEAK(fma_avx512, "avx512f", __m512, _mm512_fmadd_ps(a, b, sum[j]))
MMQ_PEAK(bf16_avx512, "avx512f,avx512bf16", __m512,
         _mm512_dpbf16_ps(sum[j], reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)))
// Added up in 16 bits: what is widened now and then is left out.
MMQ_PEAK(int8_avx2, "avx2", __m256i, _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(a, b)))
MMQ_PEAK(int8_avx512, "avx512f,avx512vnni", __m512i, _mm512_dpbusd_epi32(sum[j], a, b))
#undef MMQ_PEAK

struct Way {
    void (*run)(int64_t);
    int each;  // multiply-adds of an instruction
};

Way way_of(Peak kind) {
    const bool avx512 = __builtin_cpu_supports("avx512f"), avx2 = __builtin_cpu_supports("avx2");
    switch (kind) {
        case Peak::kFloat32:
            if (avx512) return {fma_avx512, 16};
            return avx2 && __builtin_cpu_supports("fma") ? Way{fma_avx2, 8} : Way{nullptr, 0};
        case Peak::kBFloat16:
            if (avx512 && __builtin_cpu_supports("avx512bf16")) return {bf16_avx512, 32};
            return way_of(Peak::kFloat32);  // numbers of bf16 are made fp32 first
        default:
            if (avx512 && __builtin_cpu_supports("avx512vnni")) return {int8_avx512, 64};
            return avx2 ? Way{int8_avx2, 32} : Way{nullptr, 0};
    }
}

#else

struct Way {
    void (*run)(int64_t);
    int each;
};

Way way_of(Peak) {
    return {nullptr, 0};
}

#endif

}  // namespace

int64_t multiply_adds(Peak kind, int64_t rounds, int threads) {
    const Way way = way_of(kind);
    if (way.run == nullptr) return 0;
    parallel_for(threads, threads, 1, [&](int64_t) { way.run(rounds); });
    return threads * rounds * kAccumulators * way.each;
}

}  // namespace mmq
