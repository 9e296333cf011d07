"""From measured rows to the table that `select` weighs kernels by."""

import pytest
import torch

from mmq_kernels.backends import Call
from mmq_kernels.backends.costs import GPU, Costs, Rates
from mmq_kernels.bench.rates import measured
from mmq_kernels.spec import QuantSpec

NAME = "Imaginary 3000"
TRUTH = Costs(
    NAME,
    launch=GPU.launch,
    bandwidth=2e12,
    matmul=3e14,
    kernels={
        "cuda/packed": Rates(1, 0, bandwidth=0.9, matmul=0.5),
        "cuda/dense": Rates(2, 4, bandwidth=0.7, matmul=0.95),
        "triton/packed": Rates(1, 0, bandwidth=0.6, matmul=0.4),
        "triton/dense": Rates(2, 4, bandwidth=0.5, matmul=0.9),
    },
)


def rows() -> list[dict]:
    """What a benchmark of a GPU with those rates would have written."""
    found = []
    for bits in (2, 4, 8):
        for m in (1, 16, 64, 1024, 4096):
            spec, n, k = QuantSpec(bits, 128, symmetric=True), 8192, 8192
            call = Call("gemm", torch.device("cuda"), spec=spec, m=m, n=n, k=k)
            known = {"bench": "gemm", "gpu": NAME, "activation": "none", "bits": bits, "m": m, "n": n, "k": k}
            limits = {"read_gb_per_s": 2000.0, "matmul_tflops": 300.0}
            moved = n * k * bits / 8 + 2 * n * k / 128 + 2 * m * (n + k)
            times = {f"{kernel}_us": TRUTH.seconds(kernel, call) * 1e6 for kernel in TRUTH.kernels}
            found.append(known | limits | {"bytes": moved} | times)
    return found


def test_the_rates_that_made_the_times_are_found_again() -> None:
    other = {**rows()[0], "gpu": "Another", "read_gb_per_s": 1.0}
    fused = {**rows()[0], "activation": "gelu", "read_gb_per_s": 1.0}
    table = measured([*rows(), other, fused, {"bench": "gptq", "gpu": NAME}], NAME)
    assert (table.measured_on, table.bandwidth, table.matmul) == (NAME, 2e12, 3e14)
    for kernel, rates in TRUTH.kernels.items():
        assert table.kernels[kernel].bandwidth == pytest.approx(rates.bandwidth, rel=0.02), kernel
        assert table.kernels[kernel].matmul == pytest.approx(rates.matmul, rel=0.1), kernel
    assert table.kernels["reference"] == GPU.kernels["reference"], "not measured: the estimate"


def test_a_gpu_without_rows_is_named() -> None:
    with pytest.raises(ValueError, match="rows must hold a gemm measured on 'Nothing', got none"):
        measured(rows(), "Nothing")
