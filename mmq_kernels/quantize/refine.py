"""Going on from GPTQ's codes: coordinate descent over codes, scales and zero points on the same Hessian.

The error of a layer is ``tr(D H D^T)`` with ``D = W^ - W``; its gradient is ``G = D H``. One round goes through the
groups of columns; of each group it

* moves the scale to its optimum ``s - (G . v) / (v H v)``, ``v = q - zero``, rounded to its dtype, where that helps;
* moves the zero point by one where that helps;
* gives each code, one column after another, the value that is best with all other codes as they are.

No step makes an error larger, up to rounding; rows that rounding has made worse are given back as they were.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.quantize.products import linear
from mmq_kernels.quantize.rtn import Quantized
from mmq_kernels.spec import QuantSpec

BLOCK = 256
"""Columns whose gradients are taken at once: wide enough for an efficient product."""


class Refined(NamedTuple):
    """A quantized weight and, of each row, ``d H d^T`` ``[n]``."""

    weight: Quantized
    errors: Tensor


def row_errors(weight: Tensor, found: Quantized, spec: QuantSpec, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row, ``[n]``."""
    difference = found.dequantize(spec) - weight
    return (linear(difference, hessian) * difference).sum(1)  # symmetric


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
        hessian: fp32 ``[k, k]``, symmetric and damped: its diagonal is positive.
        start: a quantized weight in the same order of columns, and its errors.
    """
    k = weight.shape[1]
    length = spec.group_length(k)
    step = max(1, BLOCK // length) * length
    codes, scale, zero = (part.clone() for part in start.weight[:3])
    difference = start.weight.dequantize(spec).sub_(weight)
    errors = start.errors.clone()
    for _ in range(rounds):
        for first in range(0, k, step):
            last = min(k, first + step)
            gradient = linear(difference, hessian[first:last])
            for begin in range(first, last, length):
                columns, group = slice(begin, min(k, begin + length)), begin // length
                inside = slice(begin - first, columns.stop - first)
                part = ops.descend(
                    gradient[:, inside],
                    hessian[columns, columns],
                    codes[:, columns],
                    scale[:, group].float(),
                    zero[:, group],
                    spec,
                    scale.dtype,
                )
                errors += part.gained
                difference[:, columns] += part.moved
                codes[:, columns], scale[:, group], zero[:, group] = part.codes, part.scale, part.zero
                if columns.stop < last:
                    gradient[:, inside.stop :].addmm_(part.moved, hessian[columns, columns.stop : last])
    return best_of(start, Refined(Quantized(codes, scale, zero), errors))
