"""Going on from GPTQ's codes: coordinate descent over codes, scales and zero points on the same Hessian.

The error of a layer is ``tr(D H D^T)`` with ``D = W^ - W``; its gradient is ``G = D H``. One round goes through the
groups of columns; of each group it

* moves the scale to its optimum ``s - (G . v) / (v H v)``, ``v = q - zero``, rounded to its dtype, where that helps;
* moves the zero point by one where that helps;
* gives each code, one column after another, the value that is best with all other codes as they are.

The last is what `ops.gptq_block` does once it is asked rightly. Column i wants ``t_i = w^_i - G_i / H_ii``, and column
j before it, having moved by d, shifts that by ``-d H_ji / H_ii``. With ``M`` the strictly upper part of ``H_ji / H_ii``
and ``K = (I + M)^-1``, GPTQ's loop over the weights ``(t + W^ M) K`` with K for its factor takes exactly these steps:
its errors spread with K as the moves do with M. So the compiled kernels serve here too.

No step makes an error larger, up to rounding; rows that rounding has made worse are given back as they were.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.quantize.rtn import Quantized
from mmq_kernels.spec import PER_CHANNEL, QuantSpec

BLOCK = 128
"""Columns of one `gptq_block`."""


class Refined(NamedTuple):
    """A quantized weight and, of each row, ``d H d^T`` ``[n]``."""

    weight: Quantized
    errors: Tensor


def row_errors(weight: Tensor, found: Quantized, spec: QuantSpec, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row, ``[n]``."""
    difference = found.dequantize(spec) - weight
    return ((difference @ hessian) * difference).sum(1)


def best_of(first: Refined, second: Refined) -> Refined:
    """Of each row the better one: rows do not depend on each other."""
    wins = second.errors < first.errors
    parts = [torch.where(wins[:, None], b, a) for a, b in zip(first.weight[:3], second.weight[:3], strict=True)]
    return Refined(Quantized(*parts), torch.minimum(first.errors, second.errors))


def refine(weight: Tensor, hessian: Tensor, start: Refined, spec: QuantSpec, rounds: int) -> Refined:
    """Codes, scales and zero points from which no single step leads to a smaller error, or `rounds` on the way there.

    A group's gradient is taken when the round comes to it, from what the groups before it have become; what its moves
    d change of the errors is ``d . (G before + G after)``, so that no product of the whole weight is needed for that.

    Args:
        weight: fp32 ``[n, k]``.
        hessian: fp32 ``[k, k]``, damped: its diagonal is positive.
        start: a quantized weight in the same order of columns, and its errors.
    """
    k = weight.shape[1]
    length = spec.group_length(k)
    step = max(1, BLOCK // length) * length  # groups enough for an efficient product
    codes, scale, zero = (part.clone() for part in start.weight[:3])
    difference = start.weight.dequantize(spec).sub_(weight)
    errors = start.errors.clone()
    for _ in range(rounds):
        for first in range(0, k, step):
            last = min(k, first + step)
            gradient = difference @ hessian[:, first:last]
            for begin in range(first, last, length):
                columns, group = slice(begin, min(k, begin + length)), begin // length
                inside = slice(begin - first, columns.stop - first)
                part = Group(
                    codes[:, columns],
                    scale[:, group].float(),
                    zero[:, group].float(),
                    hessian[columns, columns],
                    gradient[:, inside],
                )
                before = part.dense()
                part.move(spec, scale.dtype)
                moved = part.dense() - before
                errors += (moved * (gradient[:, inside] + part.gradient)).sum(1)
                difference[:, columns] += moved
                codes[:, columns], scale[:, group], zero[:, group] = part.codes, part.scale, part.zero
                if columns.stop < last:
                    gradient[:, inside.stop :].addmm_(moved, hessian[columns, columns.stop : last])
    return best_of(start, Refined(Quantized(codes, scale, zero), errors))


class Group:
    """One group of columns on its way: ``codes [n, length]``, fp32 ``scale [n]``, ``zero [n]``.

    ``gradient = D H`` of its own columns is kept true for what the group holds; the tensors given are not written to.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, gradient: Tensor) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        self.hessian, self.gradient = hessian, gradient.clone()

    def dense(self) -> Tensor:
        return self.scale[:, None] * (self.codes.float() - self.zero[:, None])

    def move(self, spec: QuantSpec, dtype: torch.dtype) -> None:
        """Scale, zero points where there are any, codes; `dtype` is that of the scale as stored."""
        self.move_scale(dtype)
        if not spec.symmetric:
            self.move_zero(spec)
        self.move_codes(spec, dtype)

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

    def move_codes(self, spec: QuantSpec, dtype: torch.dtype) -> None:
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
            codes[:, block] = ops.gptq_block(wanted, spread, scale, zero, inside, dtype)[0]
            moved = self.scale[:, None] * (codes[:, block].float() - self.zero[:, None]) - now
            self.gradient += moved @ self.hessian[block]
        self.codes = codes
