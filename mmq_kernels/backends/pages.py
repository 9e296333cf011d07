"""Memory in large pages, for what is read from end to end at every call.

Looking up an address every 4 KB can take longer than reading what is there. So the words of a weight begin where a page
of 2 MiB does, and the system is asked for as many of these as they fill. Torch's own memory begins anywhere, and the
parts of a page before the first whole one and behind the last are much of a small weight.
"""

from __future__ import annotations

import contextlib
import mmap
from math import prod

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
"""Bytes, on x86-64 and on most of Arm."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, in large pages where it fills any and the system has them."""
    count = prod(shape)
    size = count * dtype.itemsize
    if size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    block = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # lives as long as the tensor
    start = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % LARGE_PAGE
    with contextlib.suppress(OSError):  # a system without them: everything is as it was
        block.madvise(mmap.MADV_HUGEPAGE, start, size // LARGE_PAGE * LARGE_PAGE)
    return torch.frombuffer(block, dtype=dtype, count=count, offset=start).view(shape)
