// The CUDA kernels by address: of device memory, and on a device and a stream that the caller names. Built against
// csrc/cuda by nvcc for `mmq_kernels._C.cuda`, and against the same sources in emulation for the tests.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace mmq {
namespace {

using cuda::Target;

Target target_of(int device, Address stream) {
    require(device >= 0, "device", "at least 0", device);
    return {device, pointer<void>(stream)};
}

// -1 stands for the whole row; groups begin where the 16 columns of a tensor-core step begin.
int64_t cuda_group(int64_t group_size, int64_t k) {
    require(group_size == -1 || (group_size > 0 && group_size % 16 == 0) || group_size >= k, "group_size",
            "-1, at least k, or a positive multiple of 16", group_size);
    return group_size == -1 ? std::max<int64_t>(k, 1) : group_size;
}

Dtype half_of(int code, const char* name) {
    require(code == 1 || code == 2, name, "1 (float16) or 2 (bfloat16)", code);
    return static_cast<Dtype>(code);
}

cuda::Weight weight_of(int bits, int64_t group_size, int64_t n, int64_t k, Address tiles, Address scale,
                       int scale_dtype, Address zero) {
    check(bits, n, k);
    return {bits,
            n,
            k,
            cuda_group(group_size, k),
            pointer<const uint32_t>(tiles),
            pointer<const void>(scale),
            dtype_of(scale_dtype, "scale_dtype"),
            pointer<const uint32_t>(zero)};
}

void bind_gemm(py::module_& module) {
    module.def(
        "gemm",
        [](Address x, Address tiles, Address scale, Address zero, Address perm, Address input_scale,
           Address bias, Address y, Address partials, Address counters, int bits, int64_t group_size,
           int64_t m, int64_t n, int64_t k, int dtype, int scale_dtype, int activation, int device,
           Address stream) {
            require(m >= 0, "m", "at least 0", m);
            const cuda::GemmArgs args = {weight_of(bits, group_size, n, k, tiles, scale, scale_dtype, zero),
                                         m,
                                         pointer<const void>(x),
                                         pointer<const int32_t>(perm),
                                         pointer<const void>(input_scale),
                                         pointer<const void>(bias),
                                         pointer<void>(y),
                                         half_of(dtype, "dtype"),
                                         activation_of(activation),
                                         pointer<float>(partials),
                                         pointer<uint32_t>(counters)};
            const Target target = target_of(device, stream);
            py::gil_scoped_release unlocked;
            cuda::gemm(args, target);
        },
        "y[m, n] = activation((x / input_scale)[:, perm] W^T + bias); optional tensors may be 0",
        py::arg("x"), py::arg("tiles"), py::arg("scale"), py::arg("zero"), py::arg("perm"),
        py::arg("input_scale"), py::arg("bias"), py::arg("y"), py::arg("partials"), py::arg("counters"),
        py::arg("bits"), py::arg("group_size"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
        py::arg("scale_dtype"), py::arg("activation"), py::arg("device"), py::arg("stream"));
    module.def(
        "gemm_plan",
        [](int bits, int64_t group_size, int64_t m, int64_t n, int64_t k, int scale_dtype, int device) {
            require(m >= 1, "m", "at least 1", m);
            cuda::GemmArgs args{};
            args.weight = weight_of(bits, group_size, n, k, 0, 0, scale_dtype, 0);
            args.m = m;
            const cuda::GemmPlan plan = cuda::gemm_plan(args, cuda::device_limits(device));
            py::dict facts;
            facts["token_tiles"] = plan.token_tiles;
            facts["tiles"] = plan.tiles;
            facts["whole_tiles"] = plan.whole_tiles;
            facts["blocks"] = plan.blocks;
            facts["sharers"] = plan.sharers;
            facts["units"] = plan.units;
            facts["stages"] = plan.stages;
            facts["shared_bytes"] = plan.shared_bytes;
            facts["partial_floats"] = plan.partial_floats;
            facts["counters"] = plan.counters;
            return facts;
        },
        "how a product is cut into blocks, and the workspace it wants", py::arg("bits"),
        py::arg("group_size"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("scale_dtype"),
        py::arg("device"));
    module.def(
        "dequantize",
        [](Address tiles, Address scale, Address zero, Address out, int bits, int64_t group_size, int64_t n,
           int64_t k, int dtype, int scale_dtype, int device, Address stream) {
            cuda::dequantize({weight_of(bits, group_size, n, k, tiles, scale, scale_dtype, zero),
                              pointer<void>(out), dtype_of(dtype, "dtype")},
                             target_of(device, stream));
        },
        "out[n, k] = scale * (q - zero)", py::arg("tiles"), py::arg("scale"), py::arg("zero"), py::arg("out"),
        py::arg("bits"), py::arg("group_size"), py::arg("n"), py::arg("k"), py::arg("dtype"),
        py::arg("scale_dtype"), py::arg("device"), py::arg("stream"));
}

// A function of PackArgs or PrepackArgs: two buffers and the shape of a weight.
template <class Args, class Function>
void bind_conversion(py::module_& module, const char* name, const char* text, Function function) {
    using First = decltype(Args::n);
    static_assert(sizeof(First) == sizeof(int64_t), "shapes are 64-bit");
    module.def(
        name,
        [function](Address first, Address second, int bits, int64_t n, int64_t k, int device,
                   Address stream) {
            check(bits, n, k);
            Args args{};
            args.bits = bits, args.n = n, args.k = k;
            function(args, first, second, target_of(device, stream));
        },
        text, py::arg("source"), py::arg("target"), py::arg("bits"), py::arg("n"), py::arg("k"),
        py::arg("device"), py::arg("stream"));
}

void bind_conversions(py::module_& module) {
    bind_conversion<cuda::PackArgs>(module, "pack", "codes uint8 [n, k] -> words int32 [n, ceil(k*bits/32)]",
                                    [](cuda::PackArgs args, Address from, Address to, Target target) {
                                        args.codes = pointer<uint8_t>(from),
                                        args.words = pointer<uint32_t>(to);
                                        cuda::pack(args, target);
                                    });
    bind_conversion<cuda::PackArgs>(
        module, "unpack", "words -> codes", [](cuda::PackArgs args, Address from, Address to, Target target) {
            args.words = pointer<uint32_t>(from), args.codes = pointer<uint8_t>(to);
            cuda::unpack(args, target);
        });
    bind_conversion<cuda::PrepackArgs>(module, "prepack", "words -> tiles int32 [n/64, k/64, bits, 32, 4]",
                                       [](cuda::PrepackArgs args, Address from, Address to, Target target) {
                                           args.words = pointer<uint32_t>(from),
                                           args.tiles = pointer<uint32_t>(to);
                                           cuda::prepack(args, target);
                                       });
    bind_conversion<cuda::PrepackArgs>(module, "unprepack", "tiles -> words",
                                       [](cuda::PrepackArgs args, Address from, Address to, Target target) {
                                           args.tiles = pointer<uint32_t>(from),
                                           args.words = pointer<uint32_t>(to);
                                           cuda::unprepack(args, target);
                                       });
}

void bind_quantizers(py::module_& module) {
    module.def(
        "quantize_rtn",
        [](Address weight, Address codes, Address scale, Address zero, int bits, int64_t group_size,
           bool symmetric, int64_t n, int64_t k, int dtype, int scale_dtype, int device, Address stream) {
            check(bits, n, k);
            cuda::quantize_rtn(
                {bits, symmetric, n, k, group_columns(group_size, k), pointer<const void>(weight),
                 dtype_of(dtype, "dtype"), dtype_of(scale_dtype, "scale_dtype"), pointer<uint8_t>(codes),
                 pointer<float>(scale), pointer<uint8_t>(zero), 0},
                target_of(device, stream));
        },
        "weight [n, k] -> codes, scale fp32 [n, groups], zero uint8 [n, groups]", py::arg("weight"),
        py::arg("codes"), py::arg("scale"), py::arg("zero"), py::arg("bits"), py::arg("group_size"),
        py::arg("symmetric"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("scale_dtype"),
        py::arg("device"), py::arg("stream"));
    module.def(
        "gptq_block",
        [](Address weight, int64_t weight_step, int64_t weight_stride, Address hinv, int64_t hinv_step,
           int64_t hinv_stride, Address codes, Address error, Address scale, Address zero, bool search,
           int bits, int64_t group_size, bool symmetric, int64_t layers, int64_t n, int64_t columns,
           int scale_dtype, int device, Address stream) {
            check(bits, n, columns);
            require(layers >= 0 && layers < 65536, "layers", "from 0 to 65535", layers);
            require(columns <= cuda::kGptqColumns, "columns", "at most 128", columns);
            require(weight_stride >= columns, "weight_stride", "at least columns", weight_stride);
            require(hinv_stride >= columns, "hinv_stride", "at least columns", hinv_stride);
            cuda::gptq_block(
                {{bits, symmetric, n, columns, group_columns(group_size, columns),
                  pointer<const float>(weight), weight_stride, pointer<const float>(hinv), hinv_stride,
                  search, dtype_of(scale_dtype, "scale_dtype"), pointer<float>(scale), pointer<uint8_t>(zero),
                  pointer<uint8_t>(codes), pointer<float>(error), 0},
                 layers,
                 weight_step,
                 hinv_step},
                target_of(device, stream));
        },
        "one block of columns of GPTQ for `layers` weights; scale and zero are found, or given where search "
        "is false",
        py::arg("weight"), py::arg("weight_step"), py::arg("weight_stride"), py::arg("hinv"),
        py::arg("hinv_step"), py::arg("hinv_stride"), py::arg("codes"), py::arg("error"), py::arg("scale"),
        py::arg("zero"), py::arg("search"), py::arg("bits"), py::arg("group_size"), py::arg("symmetric"),
        py::arg("layers"), py::arg("n"), py::arg("columns"), py::arg("scale_dtype"), py::arg("device"),
        py::arg("stream"));
}

void bind_descent(py::module_& module) {
    module.def(
        "search_grid",
        [](Address weight, int64_t weight_stride, Address importance, Address scale, Address zero, int bits,
           bool symmetric, int64_t n, int64_t columns, int scale_dtype, int device, Address stream) {
            check(bits, n, columns);
            require(weight_stride >= columns, "weight_stride", "at least columns", weight_stride);
            cuda::search_grid({bits, symmetric, n, columns, pointer<const float>(weight), weight_stride,
                               pointer<const float>(importance), dtype_of(scale_dtype, "scale_dtype"),
                               pointer<float>(scale), pointer<uint8_t>(zero), 0},
                              target_of(device, stream));
        },
        "weight [n, columns], one group, and importance [columns] -> scale fp32 [n], zero uint8 [n]",
        py::arg("weight"), py::arg("weight_stride"), py::arg("importance"), py::arg("scale"), py::arg("zero"),
        py::arg("bits"), py::arg("symmetric"), py::arg("n"), py::arg("columns"), py::arg("scale_dtype"),
        py::arg("device"), py::arg("stream"));
    module.def(
        "descend",
        [](Address gradient, int64_t gradient_stride, Address hessian, int64_t hessian_stride, Address codes,
           Address scale, Address zero, Address moved, Address gained, int bits, bool symmetric, int64_t n,
           int64_t columns, int scale_dtype, int device, Address stream) {
            check(bits, n, columns);
            require(columns <= cuda::kGptqColumns, "columns", "at most 128", columns);
            require(gradient_stride >= columns, "gradient_stride", "at least columns", gradient_stride);
            require(hessian_stride >= columns, "hessian_stride", "at least columns", hessian_stride);
            cuda::descend(
                {bits, symmetric, n, columns, pointer<const float>(gradient), gradient_stride,
                 pointer<const float>(hessian), hessian_stride, dtype_of(scale_dtype, "scale_dtype"),
                 pointer<uint8_t>(codes), pointer<float>(scale), pointer<uint8_t>(zero),
                 pointer<float>(moved), pointer<float>(gained), 0},
                target_of(device, stream));
        },
        "one round of descent on one group; codes, scale fp32 [n] and zero uint8 [n] are changed in place",
        py::arg("gradient"), py::arg("gradient_stride"), py::arg("hessian"), py::arg("hessian_stride"),
        py::arg("codes"), py::arg("scale"), py::arg("zero"), py::arg("moved"), py::arg("gained"),
        py::arg("bits"), py::arg("symmetric"), py::arg("n"), py::arg("columns"), py::arg("scale_dtype"),
        py::arg("device"), py::arg("stream"));
}

}  // namespace

void bind_cuda(py::module_ module) {
    bind_gemm(module);
    bind_conversions(module);
    bind_quantizers(module);
    bind_descent(module);
    module.def(
        "probe",
        [](const std::string& instruction, Address in, Address out, int device, Address stream) {
            cuda::probe(instruction, pointer<const uint32_t>(in), pointer<uint32_t>(out),
                        target_of(device, stream));
        },
        "one instruction of ptx.cuh on a warp: uint32 [32, 8] -> [32, 4]; see cuda/probe.cu",
        py::arg("instruction"), py::arg("source"), py::arg("target"), py::arg("device"), py::arg("stream"));
    module.def("probe_names", &cuda::probe_names, "instructions that `probe` knows");
    module.attr("gptq_columns") = cuda::kGptqColumns;
}

}  // namespace mmq
