"""Grids narrower than the extremes of a group, where clipping a few weights serves the others better.

    scale, zero = argmin over p of  sum_j importance_j * (w_j - scale_p * (q_j - zero_p))^2

with the min-max grid of the range ``[p * low, p * high]``, p tried coarsely first and then around the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels.backends.reference import range_grid
from mmq_kernels.spec import QuantSpec

COARSE = (1.0, 0.8, 0.6, 0.45)
FINE = (0.1, -0.1, 0.05, -0.05)
"""Shares of the range: those tried first, and steps from the best of them, each from the best so far.

Behind them comes descent: eleven shares instead of eight gain less than 1% then.
"""

_WEIGHTS_AT_ONCE = {"cpu": 2**17}
"""By kind of device: so many weights, and what is made of them on the way, stay in a cache."""

_MOST_AT_ONCE = 2**22
"""Elsewhere: bounds the memory of a search to some 50 MB."""


def search_grid(weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The grid of each row of one group.

    Args:
        weight: fp32 ``[n, length]``.
        importance: fp32 ``[length]``, positive: what an error in a column costs.

    Returns:
        scale ``[n]`` in `scale_dtype`, zero uint8 ``[n]``.
    """
    rows = max(1, _WEIGHTS_AT_ONCE.get(weight.device.type, _MOST_AT_ONCE) // weight.shape[1])
    found = [_search(part, importance, spec, scale_dtype) for part in weight.split(rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search(weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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
        best = better(best, tried((best[1] + step).clamp(min=min(COARSE) / 2, max=1.0)))
    return best[2], best[3]
