"""AWQ: scale up the input channels that matter before rounding, and scale x down by as much.

    y = (x / s) @ Q(W * s)^T,    s = mean|x|^a / mean|w|^(1 - a)

``mean|x|`` is over all calibration tokens; ``mean|w|`` over the rows of all layers that read the same x, each weight as
a share of the largest of its group. s is normalized to ``sqrt(max s * min s) = 1``; a runs from 0 to 1, and ``s = 1``
is tried too. What decides is the output of the block that the layers stand in, over every calibration sample: the
layers are rounded, the block is run, and its output is held against that of the float block. Then each group's range
may be clipped, by the error of its own share of the layer's output, for the scaled weights and the scaled inputs.

Source: Lin et al., AWQ: Activation-aware Weight Quantization (arXiv 2306.00978), sections 3.2 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.backends.reference import encode, range_grid
from mmq_kernels.quantize.refine import Refined, best_of, row_errors
from mmq_kernels.quantize.rtn import Quantized, check_finite, choose_scale_dtype, quantize_weight
from mmq_kernels.spec import QuantSpec

ALPHAS = tuple(step / 20 for step in range(21))
"""Exponents that are tried."""

CLIPS = tuple(1 - step / 20 for step in range(11))
"""Shares of a group's range that are tried, the whole range first."""

LEAST = 1e-4
"""A mean below this counts as this: a channel without input or weight must not make s infinite or zero."""


def weight_magnitude(weights: Iterable[tuple[Tensor, QuantSpec]]) -> Tensor:
    """``mean|w|`` ``[k]`` over the rows of weights ``[n, k]``, each weight as a share of the largest of its group."""
    total, rows = torch.zeros(()), 0
    for weight, spec in weights:
        k = weight.shape[1]
        length = spec.group_length(k)
        size = torch.nn.functional.pad(weight.float().abs(), (0, -k % length)).view(len(weight), -1, length)
        share = size / size.amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total = total.to(share.device) + share.flatten(1)[:, :k].sum(0)
        rows += len(weight)
    return total / rows


def channel_scale(x_mean: Tensor, w_mean: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """s ``[k]``, positive, as a layer of that dtype will hold it."""
    scale = x_mean.clamp(min=LEAST) ** alpha / w_mean.clamp(min=LEAST) ** (1 - alpha)
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(min=LEAST).to(dtype).float()


def rounded(weight: Tensor, spec: QuantSpec, scale: Tensor) -> Tensor:
    """The dense weight that the layer would have: ``Q(W * s) / s``."""
    return (quantize_weight(weight.float() * scale, spec).dequantize(spec) / scale).to(weight.dtype)


def search_scale(
    weights: Sequence[tuple[Tensor, QuantSpec]], x_mean: Tensor, loss: Callable[[Sequence[Tensor]], float]
) -> Tensor:
    """The s of layers that read the same x.

    Args:
        weights: of the layers, ``[n_i, k]``, and how each is to be stored.
        x_mean: ``mean|x|`` ``[k]``.
        loss: the error of the block's output when the layers' weights are replaced by others.
    """
    w_mean, dtype = weight_magnitude(weights), weights[0][0].dtype
    candidates = [torch.ones_like(x_mean), *(channel_scale(x_mean, w_mean, alpha, dtype) for alpha in ALPHAS)]
    best, least = candidates[0], float("inf")
    for scale in candidates:
        error = loss([rounded(weight, spec, scale) for weight, spec in weights])
        if error < least:
            best, least = scale, error
    return best


def awq(weight: Tensor, hessian: Tensor, scale: Tensor, spec: QuantSpec) -> Quantized:
    """The codes of ``W * s``, each group's range clipped to where its share of the output is best.

    Args:
        weight: ``[n, k]``.
        hessian: fp32 ``[k, k]`` of x (not of ``x / s``).
        scale: s ``[k]``.

    Raises:
        ValueError: for NaN or infinity in the weight.
    """
    check_finite(weight)
    scaled = weight.float() * scale
    hessian = hessian / (scale[:, None] * scale)
    scale_dtype = choose_scale_dtype(scaled.to(weight.dtype), spec)
    k = weight.shape[1]
    length = spec.group_length(k)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grids: list[tuple[Tensor, Tensor]] = []
    for start in range(0, k, length):
        group = slice(start, min(k, start + length))
        codes[:, group], *grid = _clipped(scaled[:, group], hessian[group, group], spec, scale_dtype)
        grids.append((grid[0], grid[1]))
    clipped = Quantized(codes, torch.stack([s for s, _ in grids], 1), torch.stack([z for _, z in grids], 1))
    # A group looks at itself alone; where its row is worse off for that, nothing is clipped.
    whole = Quantized(*ops.quantize_rtn(scaled, spec, scale_dtype))
    return best_of(*(Refined(found, row_errors(scaled, found, spec, hessian)) for found in (whole, clipped))).weight


def _clipped(
    weight: Tensor, hessian: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of one group: of each row the share of its range with the least ``d H d^T``."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full_like(low, torch.inf)
    for share in CLIPS:
        scale, zero = range_grid(low * share, high * share, spec, scale_dtype)
        codes = encode(weight, scale[:, None], zero[:, None], spec)
        lost = scale.float()[:, None] * (codes.float() - zero.float()[:, None]) - weight
        error = ((lost @ hessian) * lost).sum(1)
        wins = error < least
        least = torch.where(wins, error, least)
        if best is None:
            best = codes, scale, zero
        else:
            best = (
                torch.where(wins[:, None], codes, best[0]),
                torch.where(wins, scale, best[1]),
                torch.where(wins, zero, best[2]),
            )
    assert best is not None
    return best
