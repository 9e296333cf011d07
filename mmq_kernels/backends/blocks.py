"""How GPTQ cuts the columns of a weight into blocks that never split a small group, and joins them again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmq_kernels.backends import Backend
from mmq_kernels.spec import PER_CHANNEL, QuantSpec, ceil_div


def grid_blocks(k: int, spec: QuantSpec, most: int) -> Iterator[tuple[int, int, int | None]]:
    """Blocks ``[start, end)`` of at most `most` columns, and where each gets its grid.

    The third number is None where the block finds the grids of its own (small) groups, the end of the group whose
    grid is to be found at this block's start, or 0 where the block goes on with the last grid.
    """
    length = spec.group_length(k)
    if spec.group_size != PER_CHANNEL and length <= most:
        step = most // length * length
        for start in range(0, k, step):
            yield start, min(k, start + step), None
        return
    for first in range(0, k, length):
        last = min(k, first + length)
        for start in range(first, last, most):
            yield start, min(last, start + most), last if start == first else 0


def gptq_wide(
    backend: Backend,
    weight: Tensor,
    hinv: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Backend.gptq_blocks` of more columns than the `most` that one of its launches takes.

    Blocks of columns, the errors of each carried on to the columns behind it by a matrix product.
    """
    current = weight.clone()
    layers, n, columns = weight.shape
    codes = torch.empty(layers, n, columns, dtype=torch.uint8, device=weight.device)
    error = torch.empty(layers, n, columns, device=weight.device)
    scales, zeros = [], []
    length = spec.group_length(columns)
    for start, end, grid_end in grid_blocks(columns, spec, most):
        inside = spec if grid_end is None else QuantSpec(spec.bits, PER_CHANNEL, spec.symmetric)
        block_scale = block_zero = None
        if scale is not None and zero is not None:
            groups = slice(start // length, ceil_div(end, length))
            block_scale, block_zero = scale[..., groups], zero[..., groups]
        elif grid_end is not None:
            if grid_end > 0:
                part = current[..., start:grid_end].reshape(layers * n, -1)
                _, s, z = backend.quantize_rtn(part.contiguous(), inside, scale_dtype)
                scales.append(s.view(layers, n, 1))
                zeros.append(z.view(layers, n, 1))
            block_scale, block_zero = scales[-1], zeros[-1]
        part, factor = current[..., start:end], hinv[..., start:end, start:end]
        q, e, s, z = backend.gptq_blocks(
            part.contiguous(), factor.contiguous(), block_scale, block_zero, inside, scale_dtype
        )
        codes[..., start:end], error[..., start:end] = q, e
        if grid_end is None and scale is None:
            scales.append(s)
            zeros.append(z)
        if end < columns:
            current[..., end:] -= e @ hinv[..., start:end, end:]
    if scale is not None and zero is not None:
        return codes, error, scale.clone(), zero.clone()
    return codes, error, torch.cat(scales, -1), torch.cat(zeros, -1)
