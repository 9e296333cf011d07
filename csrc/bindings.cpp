// The Python module `mmq_kernels._C`: kernels by address. `mmq_kernels/backends/cpu.py` hands over
// `data_ptr()`s of contiguous tensors whose shapes `mmq_kernels.ops` has checked; the guards here stop what
// would corrupt memory.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "build_config.h"
#include "cpu/kernels.h"
#include "cpu/packing.h"
#include "cpu/peaks.h"
#ifdef MMQ_CUDA_ARCHS
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace mmq {
namespace {

void bind_packing(py::module_& module) {
    module.def(
        "pack",
        [](Address codes, Address words, int bits, int64_t n, int64_t k, int threads) {
            check(bits, n, k, threads);
            py::gil_scoped_release unlocked;
            pack({bits, n, k, threads}, pointer<const uint8_t>(codes), pointer<int32_t>(words));
        },
        "codes uint8 [n, k] -> words int32 [n, ceil(k*bits/32)]", py::arg("codes"), py::arg("words"),
        py::arg("bits"), py::arg("n"), py::arg("k"), py::arg("threads") = 1);
    module.def(
        "unpack",
        [](Address words, Address codes, int bits, int64_t n, int64_t k, int threads) {
            check(bits, n, k, threads);
            py::gil_scoped_release unlocked;
            unpack({bits, n, k, threads}, pointer<const int32_t>(words), pointer<uint8_t>(codes));
        },
        "words -> codes", py::arg("words"), py::arg("codes"), py::arg("bits"), py::arg("n"), py::arg("k"),
        py::arg("threads") = 1);
    module.def(
        "prepack",
        [](Address words, Address tiles, int bits, int64_t n, int64_t k, int threads) {
            check(bits, n, k, threads);
            py::gil_scoped_release unlocked;
            prepack({bits, n, k, threads}, pointer<const int32_t>(words), pointer<int32_t>(tiles));
        },
        "words -> tiles int32 [ceil(n/16), ceil(k/32), bits, 16]", py::arg("words"), py::arg("tiles"),
        py::arg("bits"), py::arg("n"), py::arg("k"), py::arg("threads") = 1);
    module.def(
        "unprepack",
        [](Address tiles, Address words, int bits, int64_t n, int64_t k, int threads) {
            check(bits, n, k, threads);
            py::gil_scoped_release unlocked;
            unprepack({bits, n, k, threads}, pointer<const int32_t>(tiles), pointer<int32_t>(words));
        },
        "tiles -> words", py::arg("tiles"), py::arg("words"), py::arg("bits"), py::arg("n"), py::arg("k"),
        py::arg("threads") = 1);
}

void bind_products(py::module_& module) {
    module.def(
        "gemm",
        [](Address x, Address words, Address scale, Address zero, Address bias, Address y, int bits,
           int64_t group_size, int64_t m, int64_t n, int64_t k, int dtype, int scale_dtype, int activation,
           int activation_bits, int threads, const std::string& isa) {
            const Product product = {bits,       group_size,     m, n, k, dtype, scale_dtype,
                                     activation, activation_bits};
            const GemmArgs args = product.with(x, words, scale, zero, bias, y, threads);
            const Kernels& chosen = kernels(isa);
            py::gil_scoped_release unlocked;
            (activation_bits == 8 ? chosen.gemm_integer : chosen.gemm)(args);
        },
        "y[m, n] = activation(x[m, k] W^T + bias); zero and bias may be 0; activation_bits 16 or 8",
        py::arg("x"), py::arg("words"), py::arg("scale"), py::arg("zero"), py::arg("bias"), py::arg("y"),
        py::arg("bits"), py::arg("group_size"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
        py::arg("scale_dtype"), py::arg("activation"), py::arg("activation_bits") = 16,
        py::arg("threads") = 1, py::arg("isa") = "");
    module.def(
        "dequantize",
        [](Address words, Address scale, Address zero, Address out, int bits, int64_t group_size, int64_t n,
           int64_t k, int dtype, int scale_dtype, int threads, const std::string& isa) {
            check(bits, n, k, threads);
            const DequantizeArgs args = {weight_of(bits, group_size, n, k, words, scale, scale_dtype, zero),
                                         pointer<void>(out), dtype_of(dtype, "dtype"), threads};
            const Kernels& chosen = kernels(isa);
            py::gil_scoped_release unlocked;
            chosen.dequantize(args);
        },
        "out[n, k] = scale * (q - zero)", py::arg("words"), py::arg("scale"), py::arg("zero"), py::arg("out"),
        py::arg("bits"), py::arg("group_size"), py::arg("n"), py::arg("k"), py::arg("dtype"),
        py::arg("scale_dtype"), py::arg("threads") = 1, py::arg("isa") = "");
}

void bind_quantizers(py::module_& module) {
    module.def(
        "quantize_rtn",
        [](Address weight, Address codes, Address scale, Address zero, int bits, int64_t group_size,
           bool symmetric, int64_t n, int64_t k, int dtype, int scale_dtype, int threads,
           const std::string& isa) {
            check(bits, n, k, threads);
            const RtnArgs args = {bits,
                                  symmetric,
                                  n,
                                  k,
                                  group_columns(group_size, k),
                                  pointer<const void>(weight),
                                  dtype_of(dtype, "dtype"),
                                  dtype_of(scale_dtype, "scale_dtype"),
                                  pointer<uint8_t>(codes),
                                  pointer<float>(scale),
                                  pointer<uint8_t>(zero),
                                  threads};
            const Kernels& chosen = kernels(isa);
            py::gil_scoped_release unlocked;
            chosen.quantize_rtn(args);
        },
        "weight [n, k] -> codes, scale fp32 [n, groups], zero uint8 [n, groups]", py::arg("weight"),
        py::arg("codes"), py::arg("scale"), py::arg("zero"), py::arg("bits"), py::arg("group_size"),
        py::arg("symmetric"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("scale_dtype"),
        py::arg("threads") = 1, py::arg("isa") = "");
    module.def(
        "gptq_block",
        [](Address weight, int64_t weight_stride, Address hinv, int64_t hinv_stride, Address codes,
           Address error, Address scale, Address zero, bool search, int bits, int64_t group_size,
           bool symmetric, int64_t n, int64_t columns, int scale_dtype, int threads, const std::string& isa) {
            check(bits, n, columns, threads);
            require(weight_stride >= columns, "weight_stride", "at least columns", weight_stride);
            require(hinv_stride >= columns, "hinv_stride", "at least columns", hinv_stride);
            const GptqArgs args = {bits,
                                   symmetric,
                                   n,
                                   columns,
                                   group_columns(group_size, columns),
                                   pointer<const float>(weight),
                                   weight_stride,
                                   pointer<const float>(hinv),
                                   hinv_stride,
                                   search,
                                   dtype_of(scale_dtype, "scale_dtype"),
                                   pointer<float>(scale),
                                   pointer<uint8_t>(zero),
                                   pointer<uint8_t>(codes),
                                   pointer<float>(error),
                                   threads};
            const Kernels& chosen = kernels(isa);
            py::gil_scoped_release unlocked;
            chosen.gptq_block(args);
        },
        "one block of columns of GPTQ; scale fp32 and zero uint8 are found, or given where search is false",
        py::arg("weight"), py::arg("weight_stride"), py::arg("hinv"), py::arg("hinv_stride"),
        py::arg("codes"), py::arg("error"), py::arg("scale"), py::arg("zero"), py::arg("search"),
        py::arg("bits"), py::arg("group_size"), py::arg("symmetric"), py::arg("n"), py::arg("columns"),
        py::arg("scale_dtype"), py::arg("threads") = 1, py::arg("isa") = "");
}

void bind_descent(py::module_& module) {
    module.def(
        "search_grid",
        [](Address weight, int64_t weight_stride, Address importance, Address scale, Address zero, int bits,
           bool symmetric, int64_t n, int64_t columns, int scale_dtype, int threads, const std::string& isa) {
            check(bits, n, columns, threads);
            require(weight_stride >= columns, "weight_stride", "at least columns", weight_stride);
            const SearchArgs args = {bits,
                                     symmetric,
                                     n,
                                     columns,
                                     pointer<const float>(weight),
                                     weight_stride,
                                     pointer<const float>(importance),
                                     dtype_of(scale_dtype, "scale_dtype"),
                                     pointer<float>(scale),
                                     pointer<uint8_t>(zero),
                                     threads};
            const Kernels& chosen = kernels(isa);
            py::gil_scoped_release unlocked;
            chosen.search_grid(args);
        },
        "weight [n, columns], one group, and importance [columns] -> scale fp32 [n], zero uint8 [n]",
        py::arg("weight"), py::arg("weight_stride"), py::arg("importance"), py::arg("scale"), py::arg("zero"),
        py::arg("bits"), py::arg("symmetric"), py::arg("n"), py::arg("columns"), py::arg("scale_dtype"),
        py::arg("threads") = 1, py::arg("isa") = "");
    module.def(
        "descend",
        [](Address gradient, int64_t gradient_stride, Address hessian, int64_t hessian_stride, Address codes,
           Address scale, Address zero, Address moved, Address gained, int bits, bool symmetric, int64_t n,
           int64_t columns, int scale_dtype, int threads, const std::string& isa) {
            check(bits, n, columns, threads);
            require(gradient_stride >= columns, "gradient_stride", "at least columns", gradient_stride);
            require(hessian_stride >= columns, "hessian_stride", "at least columns", hessian_stride);
            const DescendArgs args = {bits,
                                      symmetric,
                                      n,
                                      columns,
                                      pointer<const float>(gradient),
                                      gradient_stride,
                                      pointer<const float>(hessian),
                                      hessian_stride,
                                      dtype_of(scale_dtype, "scale_dtype"),
                                      pointer<uint8_t>(codes),
                                      pointer<float>(scale),
                                      pointer<uint8_t>(zero),
                                      pointer<float>(moved),
                                      pointer<float>(gained),
                                      threads};
            const Kernels& chosen = kernels(isa);
            py::gil_scoped_release unlocked;
            chosen.descend(args);
        },
        "one round of descent on one group; codes, scale fp32 [n] and zero uint8 [n] are changed in place",
        py::arg("gradient"), py::arg("gradient_stride"), py::arg("hessian"), py::arg("hessian_stride"),
        py::arg("codes"), py::arg("scale"), py::arg("zero"), py::arg("moved"), py::arg("gained"),
        py::arg("bits"), py::arg("symmetric"), py::arg("n"), py::arg("columns"), py::arg("scale_dtype"),
        py::arg("threads") = 1, py::arg("isa") = "");
}

py::dict cuda_answer() {
    py::dict answer;
    py::list devices;
#ifdef MMQ_CUDA_ARCHS
    const cuda::Devices found = cuda::devices();
    for (const cuda::DeviceInfo& device : found.devices) {
        py::dict item;
        item["name"] = device.name;
        item["compute_capability"] = py::make_tuple(device.major, device.minor);
        item["memory_bytes"] = device.memory_bytes;
        item["multiprocessors"] = device.multiprocessors;
        devices.append(item);
    }
    answer["driver"] = found.driver;
    answer["runtime"] = found.runtime;
    answer["reason"] = found.reason;
#else
    answer["driver"] = 0;
    answer["runtime"] = 0;
    answer["reason"] = "built without CUDA";
#endif
    answer["devices"] = devices;
    return answer;
}

}  // namespace
}  // namespace mmq

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of mmq_kernels, over raw addresses.";
    mmq::bind_packing(module);
    mmq::bind_products(module);
    mmq::bind_quantizers(module);
    mmq::bind_descent(module);
    mmq::bind_repeated(module);
    module.def(
        "isa", [](const std::string& asked) { return std::string(mmq::kernels(asked).isa); },
        "instruction set in use", py::arg("isa") = "");
    module.def(
        "multiply_adds",
        [](int kind, int64_t rounds, int threads) {
            mmq::require(kind >= 0 && kind <= 2, "kind", "0 (fp32), 1 (bf16) or 2 (int8)", kind);
            mmq::require(rounds >= 0, "rounds", "at least 0", rounds);
            mmq::require(threads >= 1, "threads", "at least 1", threads);
            py::gil_scoped_release unlocked;
            return mmq::multiply_adds(static_cast<mmq::Peak>(kind), rounds, threads);
        },
        "multiply-adds between registers; returns how many were done, 0 where this CPU has no instruction "
        "for the kind",
        py::arg("kind"), py::arg("rounds"), py::arg("threads") = 1);
    module.def("isas", &mmq::runnable_isas, "instruction sets that this machine can run, best last");
    module.def("cuda_devices", &mmq::cuda_answer, "GPUs that the CUDA runtime sees, or the reason why none");
#ifdef __clang__
    module.attr("compiler") = __VERSION__;
#else
    module.attr("compiler") = "GCC " __VERSION__;
#endif
#ifdef MMQ_CUDA_ARCHS
    module.attr("cuda_archs") = MMQ_CUDA_ARCHS;
#else
    module.attr("cuda_archs") = py::none();
#endif
#ifdef MMQ_CUDA_ARCHS
    mmq::bind_cuda(module.def_submodule("cuda", "CUDA kernels"));
#endif
    module.attr("version") = MMQ_VERSION;
}
