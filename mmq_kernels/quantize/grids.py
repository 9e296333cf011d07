"""How the grid of a group is found: from its extremes, from percentiles of it, or by a search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.spec import PER_CHANNEL, QuantSpec

KINDS = ("minmax", "percentile", "search")


@dataclass(frozen=True)
class Grid:
    """Attributes:
    kind: "minmax": of the group's extremes; "percentile": of its percentiles, what lies beyond is clipped; "search": of
        the share of the extremes whose squared error, each column with its importance, is least.
    percentile: of "percentile", above 50 and at most 100; the other end of the range is at 100 less this.
    """

    kind: str = "minmax"
    percentile: float = 99.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"grid must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {self.percentile}")

    @property
    def in_loop(self) -> bool:
        """Whether `ops.gptq_block` finds such grids itself."""
        return self.kind == "minmax"

    def of_group(
        self, weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero point ``[n]`` of fp32 `weight` ``[n, length]``, all one group; importance: ``[length]``."""
        if self.kind == "search":
            return ops.search_grid(weight, importance, spec, scale_dtype)
        if self.kind == "percentile":
            ends = torch.tensor([1 - self.percentile / 100, self.percentile / 100], device=weight.device)
            low, high = torch.quantile(weight, ends, dim=1)
            weight = weight.clamp(low[:, None], high[:, None])
        one = QuantSpec(spec.bits, PER_CHANNEL, spec.symmetric)
        _, scale, zero = ops.quantize_rtn(weight.contiguous(), one, scale_dtype)
        return scale[:, 0], zero[:, 0]
