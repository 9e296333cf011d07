"""GPTQ: quantize one column after another, each error made good by the columns still to come.

For a layer ``y = x W^T`` with Hessian ``H = 2/N sum x^T x`` and ``U`` the upper Cholesky factor of ``H^-1``:

    q_j  = nearest code of w_j
    e_j  = (w_j - scale * (q_j - zero)) / U[j, j]
    w_i -= e_j * U[j, i]                               for every later column i

Columns are taken in blocks: `ops.gptq_block` works inside a block, `Carry` takes its errors to the rest.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for GPT (arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.backends.blocks import grid_blocks
from mmq_kernels.backends.reference import encode
from mmq_kernels.quantize.carry import Carry
from mmq_kernels.quantize.grids import Grid
from mmq_kernels.quantize.groups import settled_columns
from mmq_kernels.quantize.hessian import Factor, damped
from mmq_kernels.quantize.products import add_product_
from mmq_kernels.quantize.refine import Refined, best_of, refine, row_errors
from mmq_kernels.quantize.rtn import Quantized, check_finite, choose_scale_dtype
from mmq_kernels.quantize.settings import DEFAULT, GptqSettings
from mmq_kernels.spec import PER_CHANNEL, QuantSpec, ceil_div


def caught_up(weight: Tensor, drift: Tensor, factor: Factor, share: float) -> Tensor:
    """The weight ``[n, k]`` to quantize so that outputs come nearer to those of the float model.

    Of all weights, ``W + W D H^-1`` with the damped Hessian and ``D = 2/N sum (x_float - x)^T x`` takes x nearest to
    ``W x_float``; `share` says how far to go there. All the way overfits where samples are few.
    """
    step = weight.float() @ drift
    if factor.order is not None:
        step = step[:, factor.order]
    step = (step @ factor.upper.t()) @ factor.upper  # H^-1 = U^T U
    if factor.order is not None:
        step = torch.empty_like(step).index_copy_(1, factor.order, step)
    return (weight.float() + share * step).to(weight.dtype)


def gptq(weight: Tensor, factor: Factor, spec: QuantSpec, settings: GptqSettings = DEFAULT) -> Quantized:
    """The codes of `weight` ``[n, k]`` under the Hessian in `factor`.

    The grid of a group comes from the group's weights as corrected so far; that of a whole row from the weights as
    given.

    Raises:
        ValueError: for NaN or infinity in the weight.
    """
    check_finite(weight)
    scale_dtype = choose_scale_dtype(weight, spec)
    if settings.order == "static":
        return _static(weight.float(), factor, spec, scale_dtype, settings)
    current = weight.float() if factor.order is None else weight.float()[:, factor.order]
    if settings.rounds == 0:
        found = _columns(current, factor.upper, spec, scale_dtype, settings)
    else:
        found = _descended(current, factor, spec, scale_dtype, settings)
    return found if factor.order is None else _in_input_order(found, factor.order, spec)


def gptq_side_by_side(
    weights: Sequence[Tensor], factors: Sequence[Factor], spec: QuantSpec, settings: GptqSettings = DEFAULT
) -> list[Quantized]:
    """`gptq` of weights ``[n, k]`` of one shape and dtype, each under a Hessian of its own, in one loop over columns.

    Neither static groups nor descent: what follows their loops is each layer's own.

    Raises:
        ValueError: for NaN or infinity in a weight.
    """
    assert settings.order != "static" and settings.rounds == 0
    for weight in weights:
        check_finite(weight)
    in_order = [
        weight.float() if factor.order is None else weight.float()[:, factor.order]
        for weight, factor in zip(weights, factors, strict=True)
    ]
    upper = torch.stack([factor.upper for factor in factors])
    codes, scale, zero, _ = _columns(torch.stack(in_order), upper, spec, choose_scale_dtype(weights[0], spec), settings)
    found = [Quantized(*parts) for parts in zip(codes, scale, zero, strict=True)]
    return [
        one if factor.order is None else _in_input_order(one, factor.order, spec)
        for one, factor in zip(found, factors, strict=True)
    ]


def _static(
    weight: Tensor, factor: Factor, spec: QuantSpec, scale_dtype: torch.dtype, settings: GptqSettings
) -> Quantized:
    """Columns by activation on the grids of groups as the input has them; descent goes on in that order."""
    k, order = weight.shape[1], factor.order
    assert order is not None
    length = spec.group_length(k)
    importance = torch.empty_like(weight[0]).index_copy_(0, order, factor.upper.diagonal() ** -2)
    parts = zip(weight.split(length, 1), importance.split(length), strict=True)
    grids = [settings.grids().of_group(*part, spec, scale_dtype) for part in parts]
    scale, zero = (torch.stack(found, 1) for found in zip(*grids, strict=True))
    groups = order // length
    scales, zeros, current = scale.float()[:, groups], zero.float()[:, groups], weight[:, order]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, k, settings.block_size):
        end = min(k, start + settings.block_size)
        block = current[:, start:end].t().contiguous()  # a column is a row here, and in one piece
        upper = factor.upper[start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            s, z = scales[:, start + j], zeros[:, start + j]
            code = encode(block[j], s, z, spec)
            codes[:, order[start + j]] = code
            errors[j] = (block[j] - s * (code.float() - z)) / upper[j, j]
            block[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        add_product_(current[:, end:], errors.t(), factor.upper[start:end, end:], alpha=-1)
    found = Quantized(codes, scale, zero)
    if settings.rounds:
        hessian = damped(factor.hessian, factor.damping)
        start_at = Refined(found, row_errors(weight, found, spec, hessian))
        found = refine(weight, hessian, start_at, spec, settings.rounds).weight
    return found


def _descended(
    weight: Tensor, factor: Factor, spec: QuantSpec, scale_dtype: torch.dtype, settings: GptqSettings
) -> Quantized:
    """Columns and rounds of descent on the whole Hessian behind them.

    Groups that fit a block have seen descent of their own by then (groups.py). Of wider ones the columns are gone
    through once more on the grids that descent found; each row keeps the better result.
    """
    hessian = factor.damped()
    rounds = settings.rounds
    if spec.group_length(weight.shape[1]) <= settings.block_size:
        start = settled_columns(weight, factor.upper, spec, scale_dtype, settings.grids(), settings.block_size)
        return refine(weight, hessian, start, spec, rounds).weight

    def refined(found: Quantized) -> Refined:
        return refine(weight, hessian, Refined(found, row_errors(weight, found, spec, hessian)), spec, rounds)

    first = refined(_columns(weight, factor.upper, spec, scale_dtype, settings))
    again = _columns(weight, factor.upper, spec, scale_dtype, settings, first.weight)
    return best_of(first, refined(again)).weight


def _columns(
    weight: Tensor,
    upper: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    settings: GptqSettings,
    given: Quantized | None = None,
) -> Quantized:
    """The loop over the columns.

    Args:
        weight: fp32 ``[n, k]``; not modified. Or ``[layers, n, k]``, everything else then with that dimension too.
        upper: fp32 ``[k, k]``.
        settings: how grids are found, and how wide blocks are.
        given: grids to use as they are.
    """
    carry, grids, most = Carry(weight.clone(), upper), settings.grids(), settings.block_size
    k = weight.shape[-1]
    length, inside = spec.group_length(k), QuantSpec(spec.bits, PER_CHANNEL, spec.symmetric)
    # Of column j: what is left of its error once all later columns have made good.
    importance = upper.diagonal(dim1=-2, dim2=-1) ** -2
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for start, end, grid_end in grid_blocks(k, spec, most if grids.in_loop else min(length, most)):
        scale = zero = None
        small = grid_end is None  # the block holds whole groups, of which the op finds the grids
        if given is not None:
            groups = slice(start // length, ceil_div(end, length))
            scale, zero = given.scale[..., groups], given.zero[..., groups]
        elif not (small and grids.in_loop):
            if grid_end != 0:
                part = slice(start, grid_end or end)
                columns = carry.columns(part.start, part.stop)
                grid = _group_grid(grids, columns, importance[..., part], spec, scale_dtype)
                scales.append(grid[0].unsqueeze(-1))
                zeros.append(grid[1].unsqueeze(-1))
            scale, zero = scales[-1], zeros[-1]
        block_spec = spec if small and grids.in_loop else inside
        codes[..., start:end], error, found_scale, found_zero = ops.gptq_block(
            carry.columns(start, end).contiguous(),
            upper[..., start:end, start:end].contiguous(),
            scale,
            zero,
            block_spec,
            scale_dtype,
        )
        if scale is None:
            scales.append(found_scale)
            zeros.append(found_zero)
        carry.add(error, end)
    if given is not None:
        return Quantized(codes, given.scale, given.zero)
    return Quantized(codes, torch.cat(scales, -1), torch.cat(zeros, -1))


def _group_grid(
    grids: Grid, weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`Grid.of_group` of one layer or of several."""
    if weight.dim() == 2:
        return grids.of_group(weight, importance, spec, scale_dtype)
    found = [grids.of_group(*layer, spec, scale_dtype) for layer in zip(weight, importance, strict=True)]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero for _, zero in found])


def _in_input_order(found: Quantized, order: Tensor, spec: QuantSpec) -> Quantized:
    """Columns where the input has them; the groups that they were sorted into go along by index."""
    k = len(order)
    codes = torch.empty_like(found.codes).index_copy_(1, order, found.codes)
    if spec.groups(k) == 1:
        return Quantized(codes, found.scale, found.zero)
    groups = torch.arange(k, dtype=torch.int32, device=order.device) // spec.group_length(k)
    g_idx = torch.empty_like(groups).index_copy_(0, order, groups)
    return Quantized(codes, found.scale, found.zero, g_idx)


def weighted_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """``tr(E H E^T) / tr(W H W^T)`` with ``E = W - W^``: the share of the layer's output lost, squared."""
    weight = weight.float()
    error = weight - quantized.float()
    lost = float(((error @ hessian) * error).sum(dtype=torch.float64))
    whole = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0
