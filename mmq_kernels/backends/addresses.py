"""Handing tensors to compiled code: their addresses, and the numbers that stand for their dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of csrc/common/args.h, as `mmq_kernels.backends.ACTIVATIONS` is."""


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Where tensors lie; 0 for None."""
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])  # a list is faster made


def rows_in_memory(matrix: Tensor) -> Tensor:
    """`matrix` itself where each of its rows is contiguous and rows do not overlap, else a contiguous copy."""
    plain = matrix.stride(-1) == 1 and (matrix.shape[-2] < 2 or matrix.stride(-2) >= matrix.shape[-1])
    return matrix if plain else matrix.contiguous()
