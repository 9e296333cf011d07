// A product that is called again with what it was called with before: compared by identity and, on a CPU, made with
// not a step of Python in between. `mmq_kernels/ops/repeated.py` keeps one such call for each weight.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace mmq {
namespace {

py::object owned(PyObject* found) {
    if (found == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

// The name of an attribute or a method, made once.
class Name {
  public:
    explicit Name(const char* name) : name_(owned(PyUnicode_InternFromString(name))) {}
    py::object of(py::handle object) const { return owned(PyObject_GetAttr(object.ptr(), name_.ptr())); }
    py::object call(py::handle object) const {
        return owned(PyObject_CallMethodNoArgs(object.ptr(), name_.ptr()));
    }
    py::handle name() const { return name_; }

  private:
    py::object name_;
};

int64_t integer(const py::object& number) {
    const int64_t value = PyLong_AsLongLong(number.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

bool truth(const py::object& value) {
    const int found = PyObject_IsTrue(value.ptr());
    if (found < 0) throw py::error_already_set();
    return found != 0;
}

bool equal(const py::object& a, const py::object& b) {
    const int found = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (found < 0) throw py::error_already_set();
    return found != 0;
}

// What is asked of torch at each call, by its Python names: the extension knows none of its headers.
struct Torch {
    py::module_ core = py::module_::import("torch._C");
    py::module_ forward_ad = py::module_::import("torch.autograd.forward_ad");
    py::object tensor = py::module_::import("torch").attr("Tensor");
    py::object get_num_threads = core.attr("get_num_threads");
    py::object is_grad_enabled = core.attr("is_grad_enabled");
    py::object functions_looking = core.attr("_len_torch_function_stack");
    py::object profiler_enabled = core.attr("_autograd").attr("_profiler_enabled");
    py::object keys = core.attr("_dispatch_keys");
    py::object included = core.attr("_dispatch_tls_local_include_set");
    py::object excluded = core.attr("_dispatch_tls_local_exclude_set");
    Name raw_repr{"raw_repr"}, current_level{"_current_level"};
    Name dtype{"dtype"}, shape{"shape"}, device{"device"};
    Name data_ptr{"data_ptr"}, is_contiguous{"is_contiguous"}, new_empty{"new_empty"};
    int64_t passing = 0, cpu = raw("CPU"), cuda = raw("CUDA");

    Torch() {
        // Keys with nothing to do: gradients are off, and the others are for ops that write to tensors, or get none.
        const int64_t backends = raw("CPU") & raw("AutogradCPU"), more = raw("CUDA") & raw("AutogradCUDA");
        for (const char* key : {"AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "BackendSelect"}) {
            passing |= raw(key) & ~(backends | more);
        }
    }

    int64_t raw(const char* key) const {
        return bits(core.attr("DispatchKeySet")(core.attr("DispatchKey").attr(key)));
    }

    int64_t bits(const py::object& set) const {
        const uint64_t value = PyLong_AsUnsignedLongLong(raw_repr.call(set).ptr());
        if (value == static_cast<uint64_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
        return static_cast<int64_t>(value);
    }
};

const Torch& torch() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> found;
    return found.call_once_and_store_result([] { return Torch(); }).get_stored();
}

// Whether a product of x meets nothing on its way through torch's dispatcher, no gradient, mode, transform, tracer or
// profiler: what may leave it out. Never where gradients are on. Who is compiled asks torch.compiler before.
bool straight(py::handle x) {
    const Torch& t = torch();
    if (reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) != t.tensor.ptr() || truth(t.is_grad_enabled()) ||
        truth(t.functions_looking()) || truth(t.profiler_enabled()) ||
        integer(t.current_level.of(t.forward_ad)) >= 0) {
        return false;
    }
    const int64_t keys = (t.bits(t.keys(x)) | t.bits(t.included())) & ~t.bits(t.excluded()) & ~t.passing;
    return keys == t.cpu || keys == t.cuda;
}

// What may change in a tensor that stays the same object; `.to()` changes a parameter in its place.
struct Look {
    py::object shape, dtype, device;

    explicit Look(py::handle tensor)
        : shape(torch().shape.of(tensor)),
          dtype(torch().dtype.of(tensor)),
          device(torch().device.of(tensor)) {}

    bool same(py::handle tensor) const {
        const Torch& t = torch();
        return t.dtype.of(tensor).is(dtype) && equal(t.shape.of(tensor), shape) &&
               equal(t.device.of(tensor), device);
    }
};

// Which backend is insisted on: by the context's variable, or else by the environment's.
struct Forced {
    py::object by_context;
    std::string by_environment;

    explicit Forced(py::handle variable) {
        PyObject* value = nullptr;
        if (PyContextVar_Get(variable.ptr(), nullptr, &value) < 0) throw py::error_already_set();
        by_context = py::reinterpret_steal<py::object>(value);
        const char* name = std::getenv("MMQ_BACKEND");
        if (name != nullptr) by_environment = name;
    }

    bool operator==(const Forced& other) const {
        return equal(by_context, other.by_context) && by_environment == other.by_environment;
    }
};

// All that checks and choice depend on, but the weight itself; and what they led to.
class LastCall {
  public:
    LastCall(py::object x, py::object scale, py::object zero, py::object perm, py::object input_scale,
             py::object bias, py::object numbers, py::object forced, py::object version, py::object found,
             const std::optional<std::array<int64_t, 9>>& product)
        : found(std::move(found)),
          scale_(std::move(scale)),
          zero_(std::move(zero)),
          perm_(std::move(perm)),
          input_scale_(std::move(input_scale)),
          bias_(std::move(bias)),
          numbers_(std::move(numbers)),
          forced_variable_(std::move(forced)),
          version_of_(std::move(version)),
          forced_(forced_variable_),
          x_look_(x) {
        scale_dtype_ = torch().dtype.of(scale_);
        if (!perm_.is_none()) version_ = version_of_(perm_);
        if (!input_scale_.is_none()) input_scale_look_.emplace(input_scale_);
        if (!bias_.is_none()) bias_look_.emplace(bias_);
        if (product) prepare(*product);
    }

    // Whether that call was like this one. Tensors count by their identity; a scale tells how it is to be read.
    bool was(py::handle x, py::handle scale, py::handle zero, py::handle perm, py::handle input_scale,
             py::handle bias, const py::object& numbers) const {
        return scale.is(scale_) && zero.is(zero_) && perm.is(perm_) && input_scale.is(input_scale_) &&
               bias.is(bias_) && torch().dtype.of(scale).is(scale_dtype_) && x_look_.same(x) &&
               equal(numbers, numbers_) && Forced(forced_variable_) == forced_ &&
               (perm_.is_none() || equal(version_of_(perm), version_)) &&
               (!input_scale_look_ || input_scale_look_->same(input_scale)) &&
               (!bias_look_ || bias_look_->same(bias));
    }

    // The product, or None where this call needs more than its kernel.
    py::object again(py::handle x, py::handle weight, py::handle scale, py::handle zero, py::handle perm,
                     py::handle input_scale, py::handle bias, const py::object& numbers) const {
        const Torch& t = torch();
        if (!product_ || !straight(x) || !was(x, scale, zero, perm, input_scale, bias, numbers) ||
            !truth(t.is_contiguous.call(x)) || !(bias.is_none() || truth(t.is_contiguous.call(bias)))) {
            return py::none();
        }
        py::object y = empty_output(x);
        const GemmArgs args =
            product_->with(address(x), address(weight), address(scale), address(zero), address(bias),
                           address(y), static_cast<int>(integer(t.get_num_threads())));
        const Kernels& chosen = kernels("");
        {
            py::gil_scoped_release unlocked;
            (product_->activation_bits == 8 ? chosen.gemm_integer : chosen.gemm)(args);
        }
        return y;
    }

    const py::object found;

  private:
    static Address address(py::handle tensor) {
        return tensor.is_none() ? 0 : static_cast<Address>(integer(torch().data_ptr.call(tensor)));
    }

    void prepare(const std::array<int64_t, 9>& n) {
        const auto small = [&n](int i) { return static_cast<int>(n[i]); };
        product_ = {small(0), n[1], n[2], n[3], n[4], small(5), small(6), small(7), small(8)};
        const py::tuple shape = py::reinterpret_borrow<py::tuple>(x_look_.shape);
        for (size_t i = 0; i + 1 < shape.size(); ++i) y_shape_.push_back(shape[i]);
        y_shape_.push_back(py::int_(product_->n));
    }

    py::object empty_output(py::handle x) const {
        std::vector<PyObject*> arguments{x.ptr()};
        for (const py::object& size : y_shape_) arguments.push_back(size.ptr());
        return owned(PyObject_VectorcallMethod(torch().new_empty.name().ptr(), arguments.data(),
                                               arguments.size(), nullptr));
    }

    py::object scale_, zero_, perm_, input_scale_, bias_, numbers_, forced_variable_, version_of_, version_,
        scale_dtype_;
    Forced forced_;
    Look x_look_;
    std::optional<Look> input_scale_look_, bias_look_;
    std::optional<Product> product_;
    std::vector<py::object> y_shape_;
};

}  // namespace

void bind_repeated(py::module_& module) {
    module.def("straight", &straight, py::arg("x"));
    py::class_<LastCall>(module, "LastCall")
        .def(py::init<py::object, py::object, py::object, py::object, py::object, py::object, py::object,
                      py::object, py::object, py::object, const std::optional<std::array<int64_t, 9>>&>(),
             py::arg("x"), py::arg("scale"), py::arg("zero"), py::arg("perm"), py::arg("input_scale"),
             py::arg("bias"), py::arg("numbers"), py::arg("forced"), py::arg("version"), py::arg("found"),
             py::arg("product"))
        .def("was", &LastCall::was)
        .def("again", &LastCall::again)
        .def_readonly("found", &LastCall::found)
        // A copy of a weight, or a weight in a file, remembers nothing.
        .def("__reduce__",
             [](const LastCall&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
}

}  // namespace mmq
