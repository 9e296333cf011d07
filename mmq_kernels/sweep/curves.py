"""How a metric follows single factors and pairs of them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmq_kernels.sweep.fronts import UNTOUCHED, lowered, result_bits, untouched
from mmq_kernels.sweep.store import Result
from mmq_kernels.sweep.variance import Codes, Values

Curve = list[tuple[float, float]]
Level = float | str
MOST_LEVELS = 32
"""A factor with more values than that is in no surface."""


@dataclass(frozen=True)
class Surface:
    """Mean of the metric by the values of two factors, over all values of the others.

    Attributes:
        rows, columns: the two factors.
        row_levels, column_levels: their values.
        values: a list a row; None where nothing was measured.
    """

    rows: str
    columns: str
    row_levels: list[Level]
    column_levels: list[Level]
    values: list[list[float | None]]


def alone(results: Sequence[Result], metric: str) -> dict[str, Curve]:
    """By factor the mean of the metric at each number of bits, all other parts being left alone."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        bits = result_bits(result)
        if lowered(result) > 1:
            continue
        for name in bits:
            if bits[name] != UNTOUCHED or untouched(result):
                found[name][bits[name]].append(result.metrics[metric])
    return {name: [(value, float(np.mean(scores))) for value, scores in sorted(found[name].items())] for name in found}


def surfaces(
    levels: Mapping[str, Sequence[Level]], codes: Mapping[str, Codes], y: Values, order: Sequence[str], most: int
) -> list[Surface]:
    """Of each pair of factors, those first in `order` first; at most `most`.

    Args:
        levels: by factor its values, in the order of their codes.
        codes: by factor the number of its value, row by row.
        y: the metric.
    """
    drawn = [name for name in order if 2 <= len(levels[name]) <= MOST_LEVELS]
    pairs = sorted(itertools.combinations(range(len(drawn)), 2), key=lambda pair: (sum(pair), pair))[:most]
    return [_surface(drawn[one], drawn[other], levels, codes, y) for one, other in pairs]


def _surface(
    rows: str, columns: str, levels: Mapping[str, Sequence[Level]], codes: Mapping[str, Codes], y: Values
) -> Surface:
    shape = (len(levels[rows]), len(levels[columns]))
    index = codes[rows] * shape[1] + codes[columns]
    counts = np.bincount(index, minlength=shape[0] * shape[1])
    sums = np.bincount(index, y, minlength=len(counts))
    means = [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
    return Surface(
        rows,
        columns,
        list(levels[rows]),
        list(levels[columns]),
        [means[start : start + shape[1]] for start in range(0, len(means), shape[1])],
    )
