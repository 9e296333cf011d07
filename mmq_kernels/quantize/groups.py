"""GPTQ's loop with each group settled before the next: what a group costs once all later columns have made good.

Let ``U_g`` be the diagonal block of the factor that belongs to the columns of group g, ``w`` these columns as corrected
so far, and ``w^`` any quantized values for them. The scaled errors of GPTQ's loop are then

    e = (w - w^) U_g^-1,        and        e e^T = (w - w^) S (w - w^)^T,    S = U_g^-1 U_g^-T

is all that the layer's error ``tr(D H D^T)`` grows by if the later columns could be chosen freely; the sum of it over
the groups is the error itself. S is the Schur complement of the Hessian, small enough to descend on (refine.py) at the
cost of a block's work, where descent on the whole Hessian costs a product with it. So a group gets

1. a grid searched for, codes by GPTQ's loop, one round of descent on S;
2. codes by GPTQ's loop on the grid found that way, one round of descent on S;

each row keeps the better of both, and the later columns are corrected by e as in algorithm 1 (arXiv 2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.quantize.carry import Carry
from mmq_kernels.quantize.grids import Grid
from mmq_kernels.quantize.refine import Refined, best_of
from mmq_kernels.quantize.rtn import Quantized
from mmq_kernels.spec import PER_CHANNEL, QuantSpec


def settled_columns(
    weight: Tensor, upper: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, grids: Grid, block: int
) -> Refined:
    """The loop over the columns, group by group.

    Args:
        weight: fp32 ``[n, k]``; not modified.
        upper: fp32 ``[k, k]``, upper Cholesky factor of the damped inverse Hessian.
        spec: its groups have at most `block` columns.
        grids: how grids are found.
        block: columns after which errors are carried on to later ones.

    Returns:
        The quantized weight, and the error ``e e^T`` of each row.
    """
    carry, k = Carry(weight.clone(), upper), weight.shape[1]
    length = spec.group_length(k)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(len(weight), spec.groups(k), dtype=scale_dtype, device=weight.device)
    zero = torch.empty(scale.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.zeros(len(weight), device=weight.device)
    step = block // length * length
    for first in range(0, k, step):
        last = min(k, first + step)
        part = carry.columns(first, last).contiguous()
        scaled = torch.empty_like(part)
        for begin in range(first, last, length):
            end, group = min(last, begin + length), begin // length
            inside = slice(begin - first, end - first)
            found, scaled[:, inside] = _settle(
                part[:, inside].contiguous(), upper[begin:end, begin:end].contiguous(), spec, scale_dtype, grids
            )
            codes[:, begin:end] = found.codes
            scale[:, group], zero[:, group] = found.scale[:, 0], found.zero[:, 0]
            if end < last:
                part[:, inside.stop :].addmm_(scaled[:, inside], upper[begin:end, end:last], alpha=-1)
        errors += scaled.square().sum(1)
        carry.add(scaled, last)
    return Refined(Quantized(codes, scale, zero), errors)


def _settle(
    weight: Tensor, upper: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, grids: Grid
) -> tuple[Quantized, Tensor]:
    """One group ``[n, length]``: its codes and grids, and its scaled errors."""
    inside = QuantSpec(spec.bits, PER_CHANNEL, spec.symmetric)
    scale, zero = grids.of_group(weight, upper.diagonal() ** -2, spec, scale_dtype)
    one = torch.eye(len(upper), device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, one, upper=True)
    hessian = inverse @ inverse.t()
    results = []
    for _ in range(2):
        codes, scaled, _, _ = ops.gptq_block(weight, upper, scale[:, None], zero[:, None], inside, scale_dtype)
        gradient = scaled @ inverse.t().neg()
        part = ops.descend(gradient, hessian, codes, scale.float(), zero, spec, scale_dtype)
        scale, zero = part.scale.to(scale_dtype), part.zero
        scaled = scaled - part.moved @ inverse
        results.append(Refined(Quantized(part.codes, scale[:, None], zero[:, None]), scaled.square().sum(1)))
    best = best_of(*results).weight
    return best, (weight - best.dequantize(inside)) @ inverse
