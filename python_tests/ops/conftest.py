"""One suite for every backend: `on` puts each of them, on its device, in front of every test that asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch's deterministic mode asks of a GPU

import pytest
import torch

from mmq_kernels import backends, ops
from mmq_kernels.backends import Backend, Call
from mmq_kernels.spec import QuantSpec


@dataclass(frozen=True)
class On:
    """A backend and where its tensors live."""

    name: str
    device: str

    @property
    def backend(self) -> Backend:
        return backends.backend(self.name)

    def takes(self, spec: QuantSpec, k: int) -> bool:
        """Whether it has a layout for such a weight."""
        return self.backend.why_not(Call("prepack", torch.device(self.device), spec=spec, k=k)) is None

    def rounds_weights(self, spec: QuantSpec, m: int, k: int) -> bool:
        """Whether it multiplies weights that it has rounded to x's dtype, instead of scaling exact sums."""
        ragged = spec.group_length(k) % 16 != 0 and spec.groups(k) > 1
        return self.name == "triton" and (m > 64 or ragged)


def device_of(name: str) -> str:
    """The device that a backend is for; Triton's is the CPU where it is interpreted."""
    wanted = {"cuda": ("cuda",), "triton": ("cuda", "xpu")}.get(name, ())
    return next((kind for kind in wanted if getattr(torch, kind).is_available()), "cpu")


@pytest.fixture(params=backends.NAMES)
def on(request) -> Iterator[On]:
    """Ops inside the test run on this backend; new tensors are on its device, and what is allocated is poisoned."""
    name = request.param
    reason = backends.backend(name).why_unavailable()
    if reason:
        pytest.skip(f"{name}: {reason}")
    device = device_of(name)
    torch.use_deterministic_algorithms(True)  # `torch.empty` then holds NaN or the largest integer
    try:
        with torch.device(device), ops.use_backend(name):
            yield On(name, device)
    finally:
        torch.use_deterministic_algorithms(False)
