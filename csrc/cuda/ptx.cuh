// One function an instruction: its PTX for the GPU, and the same in plain C++ for the emulation.
// cuda/probe.cu runs each of them alone; python_tests/cuda/test_ptx.py compares that with arithmetic done in Python.
//
// Half-precision values travel as raw bits: uint16_t for one, uint32_t for two (the low half first).
#pragma once

#include "platform.cuh"

#ifdef MMQ_EMULATE
#include <cmath>
#include <cstring>

#include "../common/half.h"
#endif

namespace mmq {

struct Half {};
struct BFloat {};

// Bits of one type read as another of the same size.
template <class To, class From>
__device__ __forceinline__ To bitcast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a bitcast keeps the size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

#ifdef MMQ_EMULATE
// Works on what lanes handed in, not on the kernel's memory: its accesses are not checked.
#define MMQ_UNCHECKED __attribute__((no_sanitize("thread")))

namespace ptx {

template <class T>
inline float widen(uint16_t h);
template <>
inline float widen<Half>(uint16_t h) {
    return fp16_to_float(h);
}
template <>
inline float widen<BFloat>(uint16_t h) {
    return bf16_to_float(h);
}

template <class T>
inline uint16_t narrow(float value);
template <>
inline uint16_t narrow<Half>(float value) {
    return float_to_fp16(value);
}
template <>
inline uint16_t narrow<BFloat>(float value) {
    return float_to_bf16(value);
}

}  // namespace ptx
#endif

// --- conversions ---

// Half precision -> fp32, exact.
template <class T>
__device__ __forceinline__ float to_float(uint16_t h);
// fp32 -> half precision, ties to even.
template <class T>
__device__ __forceinline__ uint16_t from_float(float value);

#ifdef MMQ_EMULATE
template <class T>
inline float to_float(uint16_t h) {
    return ptx::widen<T>(h);
}
template <class T>
inline uint16_t from_float(float value) {
    return ptx::narrow<T>(value);
}
#else
template <>
__device__ __forceinline__ float to_float<Half>(uint16_t h) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h));
    return value;
}
template <>
__device__ __forceinline__ float to_float<BFloat>(uint16_t h) {
    return __uint_as_float(static_cast<uint32_t>(h) << 16);
}
template <>
__device__ __forceinline__ uint16_t from_float<Half>(float value) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(value));
    return h;
}
template <>
__device__ __forceinline__ uint16_t from_float<BFloat>(float value) {
    uint16_t h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(value));
    return h;
}
#endif

// --- integers ---

// (a & mask) | c, one LOP3.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t c) {
#ifdef MMQ_EMULATE
    return (a & mask) | c;
#else
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
    return d;
#endif
}

// Bits [shift, shift + 32) of high:low, 0 <= shift < 32.
__device__ __forceinline__ uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef MMQ_EMULATE
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
#else
    return __funnelshift_r(low, high, shift);
#endif
}

// Byte i of the result is byte `selector >> 4i & 7` of the eight bytes low:high.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef MMQ_EMULATE
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i)
        picked |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return picked;
#else
    return __byte_perm(low, high, selector);
#endif
}

// --- two half-precision values at once ---

// a * b + c of both halves, each rounded once.
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);

#ifdef MMQ_EMULATE
template <class T>
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto half = [i](uint32_t v) { return ptx::widen<T>(static_cast<uint16_t>(v >> i)); };
        // Exact in fp64, but for exponents that are far apart, which kernels do not have.
        const double value = static_cast<double>(half(a)) * half(b) + half(c);
        d |= static_cast<uint32_t>(ptx::narrow<T>(static_cast<float>(value))) << i;
    }
    return d;
}
#else
template <>
__device__ __forceinline__ uint32_t fma2<Half>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
__device__ __forceinline__ uint32_t fma2<BFloat>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
#endif

// --- 16 bytes of global memory at once, which the compiler would not always do ---

__device__ __forceinline__ void store_16(void* global, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef MMQ_EMULATE
    *static_cast<uint4*>(global) = uint4{a, b, c, d};
#else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
#endif
}

// Past L1, so that it sees what other multiprocessors wrote.
__device__ __forceinline__ void load_16(const void* global, uint32_t (&r)[4]) {
#ifdef MMQ_EMULATE
    const uint4 all = *static_cast<const uint4*>(global);
    r[0] = all.x, r[1] = all.y, r[2] = all.z, r[3] = all.w;
#else
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "l"(global)
                 : "memory");
#endif
}

// --- shared memory and asynchronous copies ---

#ifndef MMQ_EMULATE
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// 16 bytes global -> shared past L1; zeros where not `valid`. Both addresses 16-byte aligned.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool valid) {
#ifdef MMQ_EMULATE
    emulation::copy_async(shared, global, 16, valid);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

// The same for what is read once: first to leave L2.
__device__ __forceinline__ void copy_16_once(void* shared, const void* global) {
#ifdef MMQ_EMULATE
    emulation::copy_async(shared, global, 16, true);
#else
    asm volatile(
        "{ .reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
        "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, once; }" ::"r"(shared_address(shared)),
        "l"(global)
        : "memory");
#endif
}

// 8 bytes global -> shared. Both addresses 8-byte aligned.
__device__ __forceinline__ void copy_8(void* shared, const void* global) {
#ifdef MMQ_EMULATE
    emulation::copy_async(shared, global, 8, true);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global)
                 : "memory");
#endif
}

// The copies of this thread since the last call become a group.
__device__ __forceinline__ void commit_copies() {
#ifdef MMQ_EMULATE
    emulation::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the newest `kLeft` groups of this thread have landed.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
#ifdef MMQ_EMULATE
    emulation::wait_copies(kLeft);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// --- the whole warp ---

#ifdef MMQ_EMULATE
namespace ptx {

MMQ_UNCHECKED inline void load_matrices(const void* in, void* out) {
    const void* const* rows = static_cast<const void* const*>(in);
    uint32_t* registers = static_cast<uint32_t*>(out);
    for (int matrix = 0; matrix < 4; ++matrix) {
        for (int row = 0; row < 8; ++row) {
            uint32_t words[4];
            emulation::read_shared_for_lane(8 * matrix + row, rows[8 * matrix + row], 16, words);
            for (int i = 0; i < 4; ++i) registers[(4 * row + i) * 4 + matrix] = words[i];
        }
    }
}

struct MmaOperands {
    uint32_t a[4], b[2];
    float c[4];
};

// Fragments as the PTX manual draws them: A row g + 8(i&1), column 2t + 8(i>>1) + h; B row 2t + 8i + h, column g;
// C row g + 8(i>>1), column 2t + (i&1); g = lane / 4, t = lane % 4.
template <class T>
MMQ_UNCHECKED inline void multiply_fragments(const void* in, void* out) {
    const MmaOperands* lanes = static_cast<const MmaOperands*>(in);
    float a[16][16], b[16][8], *d = static_cast<float*>(out);
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; ++i) {
            const int reg = i / 2, h = i % 2;
            a[g + 8 * (reg & 1)][2 * t + 8 * (reg >> 1) + h] =
                widen<T>(static_cast<uint16_t>(lanes[lane].a[reg] >> (16 * h)));
            if (reg < 2)
                b[2 * t + 8 * reg + h][g] = widen<T>(static_cast<uint16_t>(lanes[lane].b[reg] >> (16 * h)));
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
            float sum = lanes[lane].c[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            d[4 * lane + i] = sum;
        }
    }
}

}  // namespace ptx
#endif

// Four 8x8 matrices of 16-bit values: lane 8i + r gives the address of row r of matrix i; lane l gets from matrix i
// columns 2(l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef MMQ_EMULATE
    emulation::collective("ldmatrix.x4", &row, sizeof row, r, sizeof r, &ptx::load_matrices);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// c[16, 8] += a[16, 16] b[16, 8] with fp32 accumulation.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef MMQ_EMULATE
template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const ptx::MmaOperands operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    emulation::collective("mma.m16n8k16", &operands, sizeof operands, c, sizeof c,
                          &ptx::multiply_fragments<T>);
}
#else
#define MMQ_MMA(type)                                                                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <>
__device__ __forceinline__ void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    MMQ_MMA("f16");
}
template <>
__device__ __forceinline__ void multiply_add<BFloat>(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
    MMQ_MMA("bf16");
}
#undef MMQ_MMA
#endif

#ifdef MMQ_EMULATE
namespace ptx {

struct ShuffleOperands {
    float value;
    int from;
};

MMQ_UNCHECKED inline void shuffle(const void* in, void* out) {
    const ShuffleOperands* lanes = static_cast<const ShuffleOperands*>(in);
    for (int lane = 0; lane < 32; ++lane) static_cast<float*>(out)[lane] = lanes[lanes[lane].from & 31].value;
}

}  // namespace ptx
#endif

// The value of lane `from`.
__device__ __forceinline__ float shuffle(float value, int from) {
#ifdef MMQ_EMULATE
    const ptx::ShuffleOperands operands{value, from};
    float got;
    emulation::collective("shfl", &operands, sizeof operands, &got, sizeof got, &ptx::shuffle);
    return got;
#else
    return __shfl_sync(0xFFFFFFFFu, value, from);
#endif
}

// --- between blocks ---

// Adds to a counter that other blocks add to; what this thread's block wrote before its last barrier is visible to
// whoever sees the sum, and the other way round. Returns the value before.
__device__ __forceinline__ uint32_t add_to_counter(uint32_t* counter, uint32_t value) {
#ifdef MMQ_EMULATE
    return emulation::atomic_add(counter, value);
#else
    __threadfence();
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(value)
                 : "memory");
    __threadfence();
    return before;
#endif
}

}  // namespace mmq
