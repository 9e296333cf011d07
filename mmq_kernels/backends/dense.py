"""Dequantize, then multiply as the vendor does: what many tokens are best served by."""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels.backends import Backend, RuntimeWeight
from mmq_kernels.backends.reference import activate
from mmq_kernels.spec import QuantSpec


def dense_gemm(
    backend: Backend, x: Tensor, runtime: RuntimeWeight, bias: Tensor | None, spec: QuantSpec, n: int, activation: str
) -> Tensor:
    """`Backend.gemm` of x ``[m, k]`` with the weight dequantized to x's dtype for as long as the product takes."""
    weight = backend.dequantize(runtime, spec, n, x.shape[1], backend.layout, x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # the caller chose the dtype already
        y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return activate(y, activation)
