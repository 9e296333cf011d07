"""Outputs that kernels get are poisoned, and the machines on which the CUDA kernels run."""

from __future__ import annotations

import os
from dataclasses import dataclass

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch's deterministic mode asks of a GPU

import emulation
import pytest
import torch
from torch import Tensor

from mmq_kernels.backends import backend
from mmq_kernels.backends.cuda import CudaBackend


@pytest.fixture(autouse=True)
def _poisoned():
    """torch fills what `torch.empty` returns with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Machine:
    """Where CUDA kernels run: a backend, and the device of its tensors."""

    backend: CudaBackend
    device: str

    def to(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [None if tensor is None else tensor.to(self.device) for tensor in tensors]


@pytest.fixture(params=["emulated", "gpu"], scope="session")
def machine(request) -> Machine:
    """The same kernels on the emulation and, where there is one, on a GPU."""
    if request.param == "gpu":
        reason = backend("cuda").why_unavailable()
        if reason:
            pytest.skip(f"no GPU: {reason}")
        return Machine(backend("cuda"), "cuda:0")
    reason = emulation.why_not()
    if reason:
        pytest.skip(f"no emulation: {reason}")
    return Machine(emulation.EmulatedBackend(emulation.module()), "cpu")


@pytest.fixture(scope="session")
def emulated() -> emulation.EmulatedBackend:
    """The emulation alone, for tests of schedules."""
    reason = emulation.why_not()
    if reason:
        pytest.skip(f"no emulation: {reason}")
    return emulation.EmulatedBackend(emulation.module())
