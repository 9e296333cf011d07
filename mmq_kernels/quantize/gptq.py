"""GPTQ: quantize one column after another, each error made good by the columns still to come.

For a layer ``y = x W^T`` with Hessian ``H = 2/N sum x^T x`` and ``U`` the upper Cholesky factor of ``H^-1``:

    q_j  = nearest code of w_j
    e_j  = (w_j - scale * (q_j - zero)) / U[j, j]
    w_i -= e_j * U[j, i]                               for every later column i

Columns are taken in blocks: `ops.gptq_block` works inside a block, one matmul carries its errors to the rest.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for GPT (arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.backends.blocks import grid_blocks
from mmq_kernels.backends.reference import encode
from mmq_kernels.quantize.carry import Carry
from mmq_kernels.quantize.grids import Grid
from mmq_kernels.quantize.groups import settled_columns
from mmq_kernels.quantize.products import add_product_
from mmq_kernels.quantize.refine import Refined, best_of, refine, row_errors
from mmq_kernels.quantize.rtn import Quantized, check_finite, choose_scale_dtype
from mmq_kernels.quantize.triangles import add_lower_gram_, cholesky, invert_lower_, mirror_lower_
from mmq_kernels.spec import PER_CHANNEL, QuantSpec, ceil_div

DAMPING_ATTEMPTS = 5
"""How often damping is raised tenfold before a Hessian is given up."""


class QuantizationError(RuntimeError):
    """A layer that cannot be quantized as asked, by name."""


ORDERS = ("input", "activation", "static")


@dataclass(frozen=True)
class GptqSettings:
    """Attributes:
    damping: added to the Hessian's diagonal, as a share of its mean.
    order: of the columns: "input"; "activation": those with the largest inputs first, and grouped by that order; or
        "static": in that order too, but grouped as the input has them, on the grids of the weights as given, so that a
        layer needs no index of its columns' groups.
    grid: of a group: "minmax", "percentile", or "search": the share of its range that its corrected weights want.
    percentile: of the grid "percentile", above 50 and at most 100.
    block_size: columns after which errors are carried on to all later columns; a group of this size or less is never
        split. Without descent, results differ by rounding only.
    rounds: of descent on codes, scales and zero points behind the columns (refine.py). Above 0, groups also see descent
        of their own before later columns make their errors good (groups.py).
    catch_up: how far, from 0 to 1, a layer makes good what the quantized blocks before it did to its input: at 1 its
        target is what the float model puts out there (`caught_up`).
    """

    damping: float = 0.01
    order: str = "input"
    grid: str = "minmax"
    percentile: float = Grid.percentile
    block_size: int = 128
    rounds: int = 0
    catch_up: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {self.damping}")
        if not 0 <= self.catch_up <= 1:
            raise ValueError(f"catch_up must be from 0 to 1, got {self.catch_up}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        self.grids()
        for name, value, least in (("block_size", self.block_size, 1), ("rounds", self.rounds, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def grids(self) -> Grid:
        """How grids are found."""
        return Grid(self.grid, self.percentile)

    def beyond(self) -> GptqSettings:
        """These, and all that makes GPTQ better: what the method "gptq+" stands for."""
        order = "activation" if self.order == "input" else self.order
        grid = "search" if self.grid == "minmax" else self.grid
        return replace(self, order=order, grid=grid, rounds=max(self.rounds, 1))


class Hessian:
    """``H = 2/N sum x^T x`` of the inputs of one or more layers, fp32 ``[k, k]``."""

    def __init__(self, k: int, device: torch.device) -> None:
        self._sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self._magnitude = torch.zeros(k, dtype=torch.float64, device=device)
        self._scaled = False
        self._drift: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Take in activations ``[..., k]``; not after `value`."""
        assert not self._scaled
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        add_lower_gram_(self._sum, rows)
        self._magnitude += torch.linalg.vector_norm(rows, 1, 0)
        self.rows += rows.shape[0]

    def value(self) -> Tensor:
        """H; zero where nothing was seen. Not a copy: it may be the largest thing in memory."""
        if not self._scaled:
            mirror_lower_(self._sum).mul_(2 / max(1, self.rows))
            self._scaled = True
        return self._sum

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self._sum.numel() * self._sum.element_size()

    def add_drift(self, wanted: Tensor, x: Tensor) -> None:
        """Take in what activations x ``[..., k]`` are in the float model; x goes to `add` too."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self._drift is None:
            self._drift = torch.zeros_like(self._sum)
        add_product_(self._drift, (wanted.reshape(rows.shape).float() - rows).t(), rows)

    def drift(self) -> Tensor | None:
        """``2/N sum (x_float - x)^T x``, fp32 ``[k, k]``, or None where nothing was said of the float model."""
        return None if self._drift is None else self._drift * (2 / max(1, self.rows))

    def magnitude(self) -> Tensor:
        """``mean |x|`` of each channel, fp32 ``[k]``."""
        return (self._magnitude / max(1, self.rows)).float()


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian.

    Attributes:
        hessian: fp32 ``[k, k]``, undamped, columns in input order.
        upper: fp32 ``[k, k]``, upper Cholesky factor of the damped inverse, columns in the order of the work.
        damping: the share of the mean diagonal that it took.
        order: int64 ``[k]``, the input column of each step of the work; None: input order.
    """

    hessian: Tensor
    upper: Tensor
    damping: float
    order: Tensor | None = None

    def damped(self) -> Tensor:
        """The Hessian that `upper` belongs to, in the order of the work."""
        if self.order is None:
            return _damped(self.hessian, self.damping)
        return _damp_(_in_order(self.hessian, self.order), self.damping)


DEFAULT = GptqSettings()


def factorize(hessian: Tensor, settings: GptqSettings, name: str) -> Factor:
    """Invert and factor a Hessian, with as much damping as it needs.

    Damping starts at `settings.damping` and is raised tenfold, with a warning, while the matrix is not positive
    definite. Inputs that were always zero get a diagonal of 1: their columns are rounded, never zeroed.

    Raises:
        QuantizationError: naming the layer, when the last attempt fails too.
    """
    if not _finite(hessian):
        raise QuantizationError(f"{name}: its calibration activations hold NaN or infinity")
    damping, order, ordered = settings.damping, None, hessian
    if settings.order != "input":
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        ordered = _in_order(hessian, order)
    for _ in range(DAMPING_ATTEMPTS):
        upper = _upper(ordered, damping)
        if upper is not None:
            return Factor(hessian, upper, damping, order)
        warnings.warn(
            f"{name}: Hessian not positive definite at damping {damping:g}, trying {10 * damping:g}",
            stacklevel=2,
        )
        damping *= 10
    raise QuantizationError(f"{name}: Hessian not positive definite, damping raised to {damping / 10:g} in vain")


def _upper(hessian: Tensor, damping: float) -> Tensor | None:
    """The upper Cholesky factor of the damped inverse, or None; no more than two matrices at a time beside it.

    With J the reversal of rows and columns and ``J H J = L L^T``, it is ``J L^-1 J``: one factorization, and no inverse
    of H is made.
    """
    backward = _damp_(hessian.flip(0, 1), damping)
    lower = cholesky(backward)
    del backward
    if lower is None:
        return None
    upper = invert_lower_(lower).flip(0, 1)
    return upper if _finite(upper) else None


def _in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of ``[k, k]`` in that order; gathering takes a third of the time of two look-ups."""
    return matrix[order].gather(1, order.expand_as(matrix))


def _finite(matrix: Tensor) -> bool:
    """Without a matrix of flags; NaN goes through both extremes."""
    return all(bool(extreme.isfinite()) for extreme in matrix.aminmax())


def _damped(hessian: Tensor, damping: float) -> Tensor:
    return _damp_(hessian.clone(), damping)


def _damp_(hessian: Tensor, damping: float) -> Tensor:
    diagonal = hessian.diagonal()
    unseen = diagonal == 0
    diagonal.add_(damping * (float(diagonal.mean()) or 1.0)).masked_fill_(unseen, 1.0)
    return hessian


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
        hessian = _damped(factor.hessian, factor.damping)
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
