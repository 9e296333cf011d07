"""Linear algebra on half a matrix: what is symmetric or triangular is worked on where it is not known already.

Plain torch, recursive or by panels, so that nearly all of the work is products of large matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAF = 256
"""Size from which on a triangle is cut into two: below, cutting costs more than it saves."""

_PANEL = 512
"""Columns of a symmetric product that are made in one call."""


def invert_lower_(lower: Tensor) -> Tensor:
    """A lower triangular matrix ``[k, k]``, inverted in its place; what is above the diagonal must be 0 and stays so.

    ``[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]``, with a quarter of the matrix as scratch memory.
    """
    k = len(lower)
    if k <= _LEAF:
        identity = torch.eye(k, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    half = k // 2
    a, b, c = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_lower_(a)
    invert_lower_(c)
    # In strips, so that little is multiplied with the zeros above a diagonal.
    product = torch.empty_like(b)
    for first in range(0, half, _LEAF):
        strip = slice(first, first + _LEAF)
        torch.mm(b[:, first:], a[first:, strip], out=product[:, strip])
    for first in range(0, k - half, _LEAF):
        strip = slice(first, first + _LEAF)
        torch.mm(c[strip, : first + _LEAF], product[: first + _LEAF], out=b[strip])
    b.neg_()
    return lower


def add_lower_gram_(total: Tensor, rows: Tensor) -> None:
    """``total += rows^T rows``, ``[k, k]`` and ``[m, k]``: its lower triangle, and of the upper what panels cover."""
    for first in range(0, len(total), _PANEL):
        panel = rows[:, first : first + _PANEL]
        total[first:, first : first + _PANEL].addmm_(rows[:, first:].t(), panel)


def mirror_lower_(matrix: Tensor) -> Tensor:
    """The upper triangle of a square matrix becomes the image of the lower one, panel by panel."""
    for first in range(0, len(matrix), _PANEL):
        last = first + _PANEL
        square = matrix[first:last, first:last]
        square.copy_(square.tril() + square.tril(-1).t())
        matrix[first:last, last:] = matrix[last:, first:last].t()
    return matrix
