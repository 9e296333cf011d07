"""Which kernel serves a call on a GPU: decided without one, from what `torch.cuda` would say."""

from __future__ import annotations

import pytest
import torch

from mmq_kernels import ops
from mmq_kernels.backends import crossover, cuda
from mmq_kernels.backends.crossover import ESTIMATE, Crossover
from mmq_kernels.ops import choice
from mmq_kernels.spec import QuantSpec

GPU = "Imaginary 3000"


@pytest.fixture(autouse=True)
def _forgetful():
    """Decisions are remembered as long as a process runs; here the machine changes under way."""
    choice._decide.cache_clear()
    yield
    choice._decide.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of compute capability 9.0."""
    monkeypatch.setattr(cuda.CudaBackend, "why_unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "_gpu_name", lambda device: GPU)


def choose(m: int | None, dtype=torch.float16, spec: QuantSpec | None = None, **call) -> ops.Choice:
    return ops.select(
        "gemm", "cuda:0", spec=spec or QuantSpec(4, 128), dtype=dtype, layout="cuda", m=m, n=64, k=256, **call
    )


def test_few_tokens_are_packed_and_many_dense(gpu) -> None:
    for m, kernel in (
        (1, "packed"),
        (ESTIMATE.dense_from - 1, "packed"),
        (ESTIMATE.dense_from, "dense"),
        (None, "packed"),
    ):
        chosen = choose(m)
        assert (chosen.backend, chosen.kernel) == ("cuda", kernel)
        assert "measured on no GPU" in chosen.reason
    assert str(choose(4096)).startswith("cuda/dense: m = 4096, crossover at m = 1024, estimated")


def test_a_measured_crossover_names_its_gpu(gpu, monkeypatch) -> None:
    monkeypatch.setattr(crossover, "MEASURED", (Crossover("Another", 7), Crossover(GPU, 300)))
    assert choose(299).kernel == "packed" and choose(300).kernel == "dense"
    assert f"crossover at m = 300, measured on {GPU}" in choose(299).reason


def test_fp32_goes_the_dense_way(gpu) -> None:
    assert choose(1, torch.float32).kernel == "dense"
    with (
        ops.use_backend("cuda/packed"),
        pytest.raises(RuntimeError, match="kernel 'packed' was asked for but cannot serve"),
    ):
        choose(1, torch.float32)


def test_a_kernel_can_be_asked_for(gpu, monkeypatch) -> None:
    with ops.use_backend("cuda/dense"):
        assert choose(1).kernel == "dense" and "asked for" in choose(1).reason
    monkeypatch.setenv("MMQ_BACKEND", "cuda/packed")
    assert choose(4096).kernel == "packed"
    monkeypatch.setenv("MMQ_BACKEND", "cuda/fast")
    with pytest.raises(ValueError, match="MMQ_BACKEND cuda has kernels packed, dense, got 'cuda/fast'"):
        choose(1)
    with pytest.raises(ValueError, match=r"backend reference has kernels \(only one\), got 'reference/packed'"):
        ops.use_backend("reference/packed").__enter__()


def test_what_cuda_does_not_serve_is_said(gpu, monkeypatch) -> None:
    odd = ops.select("prepack", "cuda:0", spec=QuantSpec(4, 24), k=256)
    assert odd.backend == "reference" and "group_size is 24, not a multiple of 16" in odd.reason
    assert ops.select("prepack", "cuda:0", spec=QuantSpec(4, 24), k=20).backend == "cuda"  # one group: the whole row
    assert ops.select("gptq_block", "cuda:0", spec=QuantSpec(4, 8)).backend == "cuda"
    choice._decide.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = ops.select("prepack", "cuda:0", spec=QuantSpec(4, 32), k=256)
    assert old.backend == "reference" and "compute capability is 7.5, below 8.0" in old.reason
    with (
        ops.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"'cuda' was asked for but cannot serve mmq.prepack"),
    ):
        ops.select("prepack", "cuda:0", spec=QuantSpec(4, 32), k=256)


def test_no_silent_move_to_another_device() -> None:
    chosen = ops.select("gemm", "cpu", spec=QuantSpec(4, 128), layout="planes", m=1)
    assert chosen.backend == "reference" and "cuda: " in chosen.reason and "cpu: " in chosen.reason
