"""Products of large matrices in fp32, by the faster of the two libraries that torch carries for them.

On a CPU torch multiplies fp32 by its BLAS. Where that is MKL and the CPU has AVX-512 but is not Intel's, oneDNN is
faster; it wants both matrices with their rows in one piece, and copies them into that form cost little beside the
product. With AVX2 alone MKL is.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

_WORTH = 2**22
"""Multiplications from which on a product is handed to oneDNN: below, the call costs more than it saves."""

_STRIP = 1024
"""Columns of an update that are made in one call, so that little memory is needed beside it."""


def _of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


def _is_there() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere oneDNN may have no code of its own for a shape
    return x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_faster() -> bool:
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return avx512 and torch.backends.mkl.is_available() and not _of_intel()


AVAILABLE = _is_there()
"""Whether torch has oneDNN's products for this CPU."""

ONEDNN = AVAILABLE and _is_faster()
"""Whether large products on a CPU are oneDNN's; False: torch's own."""


def by_onednn(matrix: Tensor) -> bool:
    """Whether large products with this matrix are oneDNN's."""
    return ONEDNN and matrix.device.type == "cpu" and matrix.dtype == torch.float32 and matrix.dim() == 2


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T`` of ``[m, k]`` and ``[n, k]``; no gradients."""
    if not by_onednn(x) or x.numel() * len(weight) < _WORTH:
        return x @ weight.t()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), None, "none", [], "")


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1) -> None:
    """``total += alpha * a @ b``, of matrices ``[m, k]`` and ``[k, n]`` or of batches of them; no gradients."""
    if not by_onednn(total) or a.numel() * b.shape[-1] < _WORTH:
        (Tensor.addmm_ if total.dim() == 2 else Tensor.baddbmm_)(total, a, b, alpha=alpha)
        return
    a = a.contiguous()
    for part, columns in zip(total.split(_STRIP, 1), b.split(_STRIP, 1), strict=True):
        part.add_(linear(a, columns.t()), alpha=alpha)
