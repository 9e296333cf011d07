"""Round to nearest: per group, per channel, or the study's per-tensor min-max ("uniform")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.spec import QuantSpec


class Quantized(NamedTuple):
    """One weight as codes.

    codes uint8 ``[n, k]``, scale ``[n, groups]``, zero uint8 ``[n, groups]``; g_idx int32 ``[k]``, the group of each
    column, or None where groups are runs of columns.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    g_idx: Tensor | None = None

    def dequantize(self, spec: QuantSpec) -> Tensor:
        """``scale * (q - zero)``, fp32 ``[n, k]``."""
        k = self.codes.shape[1]
        if self.g_idx is None:
            length = spec.group_length(k)
            scale = self.scale.float().repeat_interleave(length, 1)[:, :k]
            zero = self.zero.float().repeat_interleave(length, 1)[:, :k]
        else:
            scale, zero = self.scale.float()[:, self.g_idx.long()], self.zero.float()[:, self.g_idx.long()]
        return scale * (self.codes.float() - zero)


def quantize_weight(weight: Tensor, spec: QuantSpec, *, per_tensor: bool = False) -> Quantized:
    """Round `weight` ``[n, k]`` to the nearest codes of its min-max grids.

    Args:
        weight: fp16, bf16 or fp32; finite.
        spec: bits, group size, symmetry.
        per_tensor: one grid for the whole weight; it is stored once a row, so that the layout is the ordinary one.

    Raises:
        ValueError: for NaN or infinity in the weight.
    """
    check_finite(weight)
    scale_dtype = choose_scale_dtype(weight, spec)
    if not per_tensor:
        return Quantized(*ops.quantize_rtn(weight, spec, scale_dtype))
    n, k = weight.shape
    # One row that holds the whole tensor's extremes has the whole tensor's grid.
    extremes = torch.stack([weight.amin(), weight.amax()]).view(1, 2)
    _, scale, zero = ops.quantize_rtn(extremes, QuantSpec(spec.bits, symmetric=spec.symmetric), scale_dtype)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    step, origin = scale.float().item(), float(zero.item())
    for rows in range(0, n, 1024):  # bounds the memory of the fp32 copy
        part = weight[rows : rows + 1024].float()
        codes[rows : rows + 1024] = (torch.round(part / step) + origin).clamp(0, spec.max_code).to(torch.uint8)
    return Quantized(codes, scale.expand(n, 1).contiguous(), zero.expand(n, 1).contiguous())


def check_finite(weight: Tensor) -> None:
    """Raise a ValueError where a weight holds NaN or infinity."""
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"weight must be finite, got {bad} values that are NaN or infinite")


def choose_scale_dtype(weight: Tensor, spec: QuantSpec) -> torch.dtype:
    """The dtype in which a weight's scales are stored.

    16-bit weights keep their own dtype; the scales of fp32 weights are fp16, unless fp16 cannot hold them as normal
    numbers, in which case they stay fp32.
    """
    if weight.dtype == torch.bfloat16:
        return torch.bfloat16
    limits = torch.finfo(torch.float16)
    per_row = weight.abs().amax(1).float()
    largest = float(per_row.max()) * 2 / spec.max_code
    smallest = float(per_row.masked_fill(per_row == 0, torch.inf).min()) / spec.max_code
    if largest > limits.max or smallest < limits.tiny:
        return torch.float32
    return torch.float16
