// What the bindings of all kernels share: addresses, and the guards against what would corrupt memory. Python
// (`mmq_kernels.ops`) has checked the tensors; these stop a wrong number.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/args.h"
#include "common/layout.h"

namespace mmq {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
void require(bool condition, const char* name, const char* requirement, T got) {
    if (condition) return;
    throw std::invalid_argument(std::string(name) + " must be " + requirement + ", got " +
                                std::to_string(got));
}

inline void check(int bits, int64_t n, int64_t k, int threads = 1) {
    require(bits >= 2 && bits <= 8, "bits", "from 2 to 8", bits);
    require(n >= 0, "n", "at least 0", n);
    require(k >= 0, "k", "at least 0", k);
    require(threads >= 1, "threads", "at least 1", threads);
}

// -1 stands for the whole row.
inline int64_t group_columns(int64_t group_size, int64_t k) {
    require(group_size == -1 || (group_size > 0 && group_size % kGrainColumns == 0), "group_size",
            "-1 or a positive multiple of 8", group_size);
    return group_size == -1 ? std::max<int64_t>(k, 1) : group_size;
}

inline Dtype dtype_of(int code, const char* name) {
    require(code >= 0 && code <= 2, name, "0 (float32), 1 (float16) or 2 (bfloat16)", code);
    return static_cast<Dtype>(code);
}

inline Activation activation_of(int code) {
    require(code >= 0 && code <= 5, "activation", "from 0 to 5", code);
    return static_cast<Activation>(code);
}

inline Weight weight_of(int bits, int64_t group_size, int64_t n, int64_t k, Address words, Address scale,
                        int scale_dtype, Address zero) {
    const int64_t columns = group_columns(group_size, k);
    return {bits,
            n,
            k,
            columns,
            ceil_div(k, columns),
            pointer<const int32_t>(words),
            pointer<const void>(scale),
            dtype_of(scale_dtype, "scale_dtype"),
            pointer<const int32_t>(zero)};
}

// What is known of a product before its tensors are: these numbers, of which the last is 16 or 8.
struct Product {
    int bits;
    int64_t group_size, m, n, k;
    int dtype, scale_dtype, activation, activation_bits;

    GemmArgs with(Address x, Address words, Address scale, Address zero, Address bias, Address y,
                  int threads) const {
        check(bits, n, k, threads);
        require(m >= 0, "m", "at least 0", m);
        require(activation_bits == 8 || activation_bits == 16, "activation_bits", "8 or 16", activation_bits);
        return {weight_of(bits, group_size, n, k, words, scale, scale_dtype, zero),
                m,
                pointer<const void>(x),
                pointer<const void>(bias),
                pointer<void>(y),
                dtype_of(dtype, "dtype"),
                activation_of(activation),
                threads};
    }
};

// Adds the CUDA kernels to a module; in bindings_cuda.cpp.
void bind_cuda(pybind11::module_ module);

// Adds what makes a product again; in repeated.cpp.
void bind_repeated(pybind11::module_& module);

}  // namespace mmq
