"""Grids searched for and descent on one group of columns, in plain torch, for backends without kernels of their own.

What the functions do is said in `mmq_kernels.ops.descent`; the compiled kernels (csrc/cpu/descend.inl) take the same
steps, and differ in the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmq_kernels.spec import PER_CHANNEL, QuantSpec

COARSE = (1.0, 0.8, 0.6, 0.45)
FINE = (0.1, -0.1, 0.05, -0.05)
"""Shares of the range: those tried first, and steps from the best of them, each from the best so far.

Behind them comes descent: eleven shares instead of eight gain less than 1% then.
"""

LEAST = min(COARSE) / 2
"""The least share tried."""

BLOCK = 128
"""Columns of one `gptq_block`."""

_WEIGHTS_AT_ONCE = {"cpu": 2**17}
"""By kind of device: so many weights, and what is made of them on the way, stay in a cache."""

_MOST_AT_ONCE = 2**22
"""Elsewhere: bounds the memory of a search to some 50 MB."""

RangeGrid = Callable[[Tensor, Tensor, QuantSpec, torch.dtype], tuple[Tensor, Tensor]]
GptqBlock = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


class Descended(NamedTuple):
    """A group after a round: codes uint8 ``[n, B]``, fp32 scale and uint8 zero ``[n]``, and what has changed.

    ``moved [n, B]`` was added to the dequantized weight, ``gained [n]`` to the error.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    moved: Tensor
    gained: Tensor


def search_grid(
    weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, range_grid: RangeGrid
) -> tuple[Tensor, Tensor]:
    rows = max(1, _WEIGHTS_AT_ONCE.get(weight.device.type, _MOST_AT_ONCE) // weight.shape[1])
    found = [_search(part, importance, spec, scale_dtype, range_grid) for part in weight.split(rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search(
    weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, range_grid: RangeGrid
) -> tuple[Tensor, Tensor]:
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    held = torch.empty_like(weight)

    def tried(share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, zero = range_grid(low * share, high * share, spec, scale_dtype)
        s, z = scale.float()[:, None], zero.float()[:, None]
        lost = torch.div(weight, s, out=held).round_().clamp_(-z, spec.max_code - z).mul_(s).sub_(weight).square_()
        return lost @ importance, share, scale, zero

    def better(best: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wins = other[0] < best[0]
        return tuple(torch.where(wins, b, a) for a, b in zip(best, other, strict=True))

    best: tuple[Tensor, ...] = tried(torch.full_like(low, COARSE[0]))
    for share in COARSE[1:]:
        best = better(best, tried(torch.full_like(low, share)))
    for step in FINE:
        best = better(best, tried((best[1] + step).clamp(min=LEAST, max=1.0)))
    return best[2], best[3]


def descend(
    gradient: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    gptq_block: GptqBlock,
) -> Descended:
    group = _Group(codes, scale, zero.float(), hessian, gradient.clone())
    before = group.dense()
    group.move_scale(scale_dtype)
    if not spec.symmetric:
        group.move_zero(spec)
    group.move_codes(spec, scale_dtype, gptq_block)
    moved = group.dense() - before
    gained = (moved * (gradient + group.gradient)).sum(1)
    return Descended(group.codes, group.scale, group.zero.to(torch.uint8), moved, gained)


class _Group:
    """One group on its way; ``gradient = D H`` of its own columns is kept true for what the group holds.

    The codes' step is what `gptq_block` does once it is asked rightly. Column i wants ``t_i = w^_i - G_i / H_ii``, and
    column j before it, having moved by d, shifts that by ``-d H_ji / H_ii``. With ``M`` the strictly upper part of
    ``H_ji / H_ii`` and ``K = (I + M)^-1``, GPTQ's loop over the weights ``(t + W^ M) K`` with K for its factor takes
    exactly these steps: its errors spread with K as the moves do with M.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, gradient: Tensor) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        self.hessian, self.gradient = hessian, gradient

    def dense(self) -> Tensor:
        return self.scale[:, None] * (self.codes.float() - self.zero[:, None])

    def move_scale(self, dtype: torch.dtype) -> None:
        direction = self.codes.float() - self.zero[:, None]
        along = direction @ self.hessian
        slope, curvature = (self.gradient * direction).sum(1), (along * direction).sum(1)
        wanted = (self.scale - slope / curvature).to(dtype).float()
        step = wanted - self.scale
        # NaN, infinity and signs that change fail these comparisons.
        helps = (2 * step * slope + step * step * curvature < 0) & (wanted >= torch.finfo(dtype).tiny)
        step = torch.where(helps, step, 0.0)
        self.scale = self.scale + step
        self.gradient += step[:, None] * along

    def move_zero(self, spec: QuantSpec) -> None:
        along = self.hessian.sum(0)
        curvature = along.sum()
        for step in (1.0, -1.0):
            shift = -self.scale * step
            inside = (self.zero + step >= 0) & (self.zero + step <= spec.max_code)
            helps = inside & (2 * shift * self.gradient.sum(1) + shift * shift * curvature < 0)
            self.zero = self.zero + torch.where(helps, step, 0.0)
            self.gradient += torch.where(helps, shift, 0.0)[:, None] * along

    def move_codes(self, spec: QuantSpec, dtype: torch.dtype, gptq_block: GptqBlock) -> None:
        inside = QuantSpec(spec.bits, PER_CHANNEL, spec.symmetric)
        scale, zero = self.scale[:, None].to(dtype), self.zero[:, None].to(torch.uint8)
        width = self.codes.shape[1]
        codes = torch.empty_like(self.codes)
        for start in range(0, width, BLOCK):
            block = slice(start, min(width, start + BLOCK))
            square = self.hessian[block, block]
            diagonal = square.diagonal()
            one = torch.eye(len(diagonal), device=square.device)
            spread = torch.linalg.solve_triangular((square / diagonal).triu(1) + one, one, upper=True)
            now = self.scale[:, None] * (self.codes[:, block].float() - self.zero[:, None])
            wanted = (now - self.gradient[:, block] / diagonal + now @ (square / diagonal).triu(1)) @ spread
            codes[:, block] = gptq_block(wanted, spread, scale, zero, inside, dtype)[0]
            moved = self.scale[:, None] * (codes[:, block].float() - self.zero[:, None]) - now
            self.gradient += moved @ self.hessian[block]
        self.codes = codes
