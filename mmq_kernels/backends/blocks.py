"""How GPTQ cuts the columns of a weight into blocks that never split a small group."""

from __future__ import annotations

from collections.abc import Iterator

from mmq_kernels.spec import PER_CHANNEL, QuantSpec


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
