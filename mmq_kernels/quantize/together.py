"""GPTQ of all layers of a block: as few passes over columns as give the same codes.

Rows do not depend on each other, so weights that read one input, and so have one Hessian, are gone through as one. Of
several inputs, weights of one shape can go side by side. Columns are a chain: on a GPU, which is nearly idle along it,
a launch for several layers takes hardly longer than for one; on a CPU, whose cores a single layer fills, it would only
take more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmq_kernels.quantize.gptq import gptq, gptq_side_by_side
from mmq_kernels.quantize.hessian import Factor
from mmq_kernels.quantize.rtn import Quantized, check_finite, choose_scale_dtype
from mmq_kernels.quantize.settings import DEFAULT, GptqSettings
from mmq_kernels.spec import QuantSpec

Reading = tuple[Sequence[Tensor], Callable[[], Factor]]
"""Weights ``[n_i, k]`` of the layers that read one input, and what gives its factor; asked for when it is needed."""

_Pass = tuple[int, tuple[int, ...]]
"""Index of a reading, and of the weights in it whose rows are gone through as one."""


def gptq_together(
    readings: Sequence[Reading],
    spec: QuantSpec,
    settings: GptqSettings = DEFAULT,
    *,
    side_by_side: Callable[[torch.device, GptqSettings], bool] | None = None,
) -> list[list[Quantized]]:
    """`gptq` of every weight of every reading.

    Args:
        readings: of one block.
        side_by_side: whether weights of one shape go side by side; default `pays`.

    Raises:
        ValueError: for NaN or infinity in a weight.
    """
    found: dict[tuple[int, int], Quantized] = {}
    for passes in _alike(readings, spec):
        first = readings[passes[0][0]][0][passes[0][1][0]]
        several = len(passes) > 1 and (side_by_side or pays)(first.device, settings)
        for together in [passes] if several else [[one] for one in passes]:
            weights = [torch.cat([readings[index][0][own] for own in members]) for index, members in together]
            factors = [readings[index][1]() for index, _ in together]
            if several:
                done = gptq_side_by_side(weights, factors, spec, settings)
            else:
                done = [gptq(weights[0], factors[0], spec, settings)]
            for (index, members), result in zip(together, done, strict=True):
                parts = _split(result, [len(readings[index][0][own]) for own in members])
                found |= {(index, own): part for own, part in zip(members, parts, strict=True)}
    return [[found[index, own] for own in range(len(weights))] for index, (weights, _) in enumerate(readings)]


def pays(device: torch.device, settings: GptqSettings) -> bool:
    """Whether layers of one shape are quicker side by side than one after another."""
    return device.type != "cpu" and settings.order != "static" and settings.rounds == 0


def _alike(readings: Sequence[Reading], spec: QuantSpec) -> list[list[_Pass]]:
    """Passes over rows that are one in reading, dtype and scales' dtype; in lists of one shape."""
    shapes: dict[tuple[object, ...], list[_Pass]] = {}
    for index, (weights, _) in enumerate(readings):
        kinds: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for own, weight in enumerate(weights):
            check_finite(weight)
            kinds.setdefault((weight.dtype, choose_scale_dtype(weight, spec)), []).append(own)
        for kind, members in kinds.items():
            rows, k = sum(len(weights[own]) for own in members), weights[members[0]].shape[1]
            key = (*kind, rows, k, weights[members[0]].device)
            shapes.setdefault(key, []).append((index, tuple(members)))
    return list(shapes.values())


def _split(result: Quantized, rows: Sequence[int]) -> list[Quantized]:
    codes, scale, zero, g_idx = result
    parts = zip(codes.split(rows), scale.split(rows), zero.split(rows), strict=True)
    return [Quantized(q.clone(), s.clone(), z.clone(), g_idx) for q, s, z in parts]
