// The Python module `mmq_emulation`: the bindings of the CUDA kernels, running on this machine's CPU, and the knobs of
// the engine. Built by python_tests/cuda/emulation.py.
#include <pybind11/stl.h>

#include "../bindings.h"
#include "../cuda/device.h"
#include "engine.h"

namespace py = pybind11;

namespace mmq::cuda {

const DeviceLimits& device_limits(int) {
    static DeviceLimits limits;
    const emulation::Settings& settings = emulation::settings();
    // A multiprocessor holds what two blocks may ask for, as the smaller GPUs' nearly do.
    limits = {settings.multiprocessors, settings.shared_limit, 2 * settings.shared_limit};
    return limits;
}

}  // namespace mmq::cuda

PYBIND11_MODULE(mmq_emulation, module) {
    using mmq::emulation::Settings;
    mmq::bind_cuda(module.def_submodule("cuda", "CUDA kernels, emulated"));
    module.def(
        "configure",
        [](int policy, uint64_t seed, int resident_blocks, int multiprocessors, int shared_limit) {
            mmq::require(policy >= 0 && policy <= 2, "policy", "0 (in order), 1 (reverse) or 2 (run-ahead)",
                         policy);
            mmq::require(resident_blocks >= 1, "resident_blocks", "at least 1", resident_blocks);
            mmq::require(multiprocessors >= 1, "multiprocessors", "at least 1", multiprocessors);
            mmq::emulation::settings() = {static_cast<mmq::emulation::Policy>(policy), seed, resident_blocks,
                                          multiprocessors, shared_limit};
        },
        py::arg("policy") = 0, py::arg("seed") = 0, py::arg("resident_blocks") = 3,
        py::arg("multiprocessors") = 2, py::arg("shared_limit") = 99 * 1024);
}
