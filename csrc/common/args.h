// Arguments of the kernels: raw pointers, shapes, and nothing of Python or torch.
#pragma once

#include <cstdint>

// Functions that kernels for the CPU and for the GPU share.
#ifdef __CUDACC__
#define MMQ_BOTH __host__ __device__
#else
#define MMQ_BOTH
#endif

namespace mmq {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kQuickGelu = 4, kSilu = 5 };

// A weight W[n, k] = scale * (q - zero) in the cpu layout (layout.h).
struct Weight {
    int bits;
    int64_t n, k;
    int64_t group_size;    // columns that share a scale: positive; the last group may be shorter
    int64_t groups;        // ceil(k/group_size)
    const int32_t* words;  // [ceil(n/16), ceil(k/32), bits, 16]
    const void* scale;     // [ceil(n/16), groups, 16] of scale_dtype
    Dtype scale_dtype;
    const int32_t* zero;  // [ceil(n/16), ceil(groups*16*bits/32)] dense streams, or null: zero = 2^(bits-1)
};

// y[m, n] = activation(x[m, k] W^T + bias[n])
struct GemmArgs {
    Weight weight;
    int64_t m;
    const void* x;
    const void* bias;  // or null
    void* y;
    Dtype dtype;  // of x, bias and y
    Activation activation;
    int threads;
};

// out[n, k] = scale * (q - zero), rounded once to dtype
struct DequantizeArgs {
    Weight weight;
    void* out;
    Dtype dtype;
    int threads;
};

// Stream words [n, ceil(k*bits/32)] <-> codes [n, k]; words <-> cpu layout
struct PackArgs {
    int bits;
    int64_t n, k;
    int threads;
};

// Round to nearest on min-max grids of groups of W[n, k].
struct RtnArgs {
    int bits;
    bool symmetric;
    int64_t n, k;
    int64_t group_size;
    const void* weight;  // [n, k] of dtype
    Dtype dtype;
    Dtype scale_dtype;  // what scales are rounded to before codes are chosen
    uint8_t* codes;     // [n, k]
    float* scale;       // [n, groups], values of scale_dtype
    uint8_t* zero;      // [n, groups]
    int threads;
};

// One block of columns of GPTQ.
struct GptqArgs {
    int bits;
    bool symmetric;
    int64_t n, columns;
    int64_t group_size;
    const float* weight;  // [n, columns], rows weight_stride apart; not written
    int64_t weight_stride;
    const float* hinv;  // [columns, columns], rows hinv_stride apart, upper triangle read
    int64_t hinv_stride;
    bool search;  // find scale and zero; otherwise they are inputs
    Dtype scale_dtype;
    float* scale;    // [n, groups]
    uint8_t* zero;   // [n, groups]
    uint8_t* codes;  // [n, columns]
    float* error;    // [n, columns]
    int threads;
};

// The grid of each row of one group, searched for.
struct SearchArgs {
    int bits;
    bool symmetric;
    int64_t n, columns;
    const float* weight;  // [n, columns], rows weight_stride apart
    int64_t weight_stride;
    const float* importance;  // [columns]
    Dtype scale_dtype;
    float* scale;   // [n]
    uint8_t* zero;  // [n]
    int threads;
};

// One round of descent on one group.
struct DescendArgs {
    int bits;
    bool symmetric;
    int64_t n, columns;
    const float* gradient;  // [n, columns], rows gradient_stride apart; not written
    int64_t gradient_stride;
    const float* hessian;  // [columns, columns], symmetric, rows hessian_stride apart
    int64_t hessian_stride;
    Dtype scale_dtype;
    uint8_t* codes;  // [n, columns], in and out
    float* scale;    // [n], in and out
    uint8_t* zero;   // [n], in and out
    float* moved;    // [n, columns], what was added to the dequantized weight
    float* gained;   // [n], what was added to the error
    int threads;
};

}  // namespace mmq
