"""Products with activations of 8 bits in plain torch: bit for bit what `csrc/cpu/integer.inl` computes.

    unit[t] = max |x[t]| / 127                          of each token
    x8[t]   = rint(x[t] / unit[t])                      in [-127, 127]
    y[t, n] = unit[t] * sum over segments of scale[n, g] * (sum of (q[n, k] - zero[n, g]) * x8[t, k])

A segment is at most 256 columns of one group: its sum is an integer below 2^24, exact however it is added up. The sums
are scaled and added in fp32 in the order of the columns. All that is lost beside float activations is the rounding of
x: ``|x - unit * x8| <= unit / 2``, so an output is off by at most ``max |x[t]| / 254 * sum of |W[n]|``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels import packing
from mmq_kernels.backends import PackedWeight
from mmq_kernels.spec import QuantSpec

SEGMENT = 256
"""Columns at most that are added up as integers; `kSegmentColumns` of csrc/cpu."""


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x ``[m, k]`` -> integers fp32 ``[m, k]`` in [-127, 127], unit fp32 ``[m, 1]``.

    A token that holds NaN or infinity gets a unit of NaN and integers of 0.
    """
    x = x.float()
    most = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    unit = (most / 127).clamp(min=torch.finfo(torch.float32).tiny)
    unit = torch.where(most.isfinite(), unit, torch.nan)
    return torch.where(unit.isnan(), 0.0, torch.round(x / unit)), unit


def multiply_integers(x: Tensor, packed: PackedWeight, spec: QuantSpec, n: int) -> Tensor:
    """``x [m, k] @ W[n, k]^T`` with x rounded to 8 bits, fp32 ``[m, n]``, from on-disk tensors."""
    k = x.shape[1]
    integers, unit = quantize_tokens(x)
    codes = packing.unpack_stream(packed.words, spec.bits, k).double()
    if packed.zero is None:
        zero = codes.new_full((n, spec.groups(k)), spec.middle_code)
    else:
        zero = packing.unpack_stream(packed.zero.t().contiguous(), spec.bits, n).t().double()
    scale, length = packed.scale.float(), max(1, spec.group_length(k))
    y = torch.zeros(len(x), n, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for group in range(spec.groups(k)):
            stop = min(k, (group + 1) * length)
            for begin in range(group * length, stop, SEGMENT):
                columns = slice(begin, min(stop, begin + SEGMENT))
                # In fp64 products of integers and their sums are exact.
                sums = integers[:, columns].double() @ (codes[:, columns] - zero[:, group, None]).t()
                y += scale[:, group] * sums.float()
    return y * unit
