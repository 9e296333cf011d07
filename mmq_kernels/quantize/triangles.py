"""Linear algebra on half a matrix: what is symmetric or triangular is worked on where it is not known already.

Plain torch, recursive or by panels, so that nearly all of the work is products of large matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels.quantize.products import add_product_, by_onednn

_LEAF = 256
"""Size from which on a triangle is cut into two: below, cutting costs more than it saves."""

_PANEL = 512
"""Columns of a symmetric product that are made in one call."""


def cholesky(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor of ``[k, k]``, whose memory it may take; None where that is not positive definite.

    LAPACK's; where products are faster than what it multiplies by (products.py), by leaves of it and products.
    """
    if not by_onednn(matrix):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return None if failed else lower
    for first in range(0, len(matrix), _LEAF):
        last = first + _LEAF
        leaf, failed = torch.linalg.cholesky_ex(matrix[first:last, first:last])
        if failed:
            return None
        matrix[first:last, first:last] = leaf
        matrix[first:last, last:] = 0
        below = torch.linalg.solve_triangular(leaf.t(), matrix[last:, first:last], upper=True, left=False).contiguous()
        matrix[last:, first:last] = below
        rest = matrix[last:, last:]
        for panel in range(0, len(rest), _PANEL):
            columns = slice(panel, panel + _PANEL)
            add_product_(rest[panel:, columns], below[panel:], below[columns].t(), alpha=-1)
    return matrix


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
    columns = rows.t().contiguous() if by_onednn(total) else rows.t()
    for first in range(0, len(total), _PANEL):
        panel = slice(first, first + _PANEL)
        add_product_(total[first:, panel], columns[first:], columns[panel].t())


def mirror_lower_(matrix: Tensor) -> Tensor:
    """The upper triangle of a square matrix becomes the image of the lower one, panel by panel."""
    for first in range(0, len(matrix), _PANEL):
        last = first + _PANEL
        square = matrix[first:last, first:last]
        square.copy_(square.tril() + square.tril(-1).t())
        matrix[first:last, last:] = matrix[last:, first:last].t()
    return matrix
