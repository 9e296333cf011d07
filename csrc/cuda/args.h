// Arguments of the CUDA kernels: raw device pointers, shapes, and plain numbers; and what a launch needs beside them.
#pragma once

#include <cstdint>

#include "../common/args.h"

namespace mmq::cuda {

// Where a launch goes. `stream` is a cudaStream_t.
struct Target {
    int device;
    void* stream;
};

// A weight W[n, k] = scale * (q - zero) in the cuda layout (layout.cuh).
struct Weight {
    int bits;
    int64_t n, k;
    int64_t group_size;     // columns that share a scale: a positive multiple of 16, or at least k
    const uint32_t* tiles;  // uint4 [ceil(n/64), ceil(k/64), bits, 32]
    const void* scale;      // [groups, 64*ceil(n/64)] of scale_dtype, rows in scale order
    Dtype scale_dtype;
    const uint32_t* zero;  // [groups, 2*bits*ceil(n/64)] dense streams in scale order, or null: 2^(bits-1)
};

// y[m, n] = activation((x / input_scale)[:, perm] W^T + bias)
struct GemmArgs {
    Weight weight;
    int64_t m;
    const void* x;            // [m, k] of dtype
    const int32_t* perm;      // [k], or null
    const void* input_scale;  // [k] of dtype, or null
    const void* bias;         // [n] of dtype, or null
    void* y;                  // [m, n] of dtype
    Dtype dtype;              // fp16 or bf16
    Activation activation;
    float* partials;     // gemm_plan().partial_floats of them; what is in them does not matter
    uint32_t* counters;  // gemm_plan().counters of them, all zero before and after
};

struct DequantizeArgs {
    Weight weight;
    void* out;  // [n, k] of dtype, columns in stored order
    Dtype dtype;
};

struct PackArgs {
    int bits;
    int64_t n, k;
    uint8_t* codes;   // [n, k]
    uint32_t* words;  // [n, ceil(k*bits/32)] dense streams
};

struct PrepackArgs {
    int bits;
    int64_t n, k;
    uint32_t* words;  // [n, ceil(k*bits/32)] dense streams
    uint32_t* tiles;  // uint4 [ceil(n/64), ceil(k/64), bits, 32]
};

// Layers of the same shape, one after another, each as RtnArgs and GptqArgs of common/args.h say.
struct GptqBatch {
    GptqArgs layer;
    int64_t layers;
    int64_t weight_step, hinv_step;  // elements from layer to layer; the other tensors are contiguous
};

}  // namespace mmq::cuda
