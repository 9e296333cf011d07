"""Where the variation of a metric comes from: functional analysis of variance, and exact Shapley values of a grid.

On a full grid (every combination of the factors' values was measured) the metric is a sum of a mean, a term of each
factor, a term of each pair, and a rest; the terms are orthogonal and their variances add up::

    y(x) = m + sum_i f_i(x_i) + sum_{i<j} f_ij(x_i, x_j) + rest(x)

Elsewhere the terms overlap. Then a factor is given what a least-squares fit of all factors loses without it, and what
several explain as well as each other stands apart; the few pairs by which the fit gains most are given their gains, one
after the other.

Source: Sobol 1993; Hooker, "Generalized functional ANOVA diagnostics", 2007; Shapley values over the grid's marginal
means after Strumbelj and Kononenko 2014.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAIRED_FACTORS = 8
"""Pairs are made of so many factors, the strongest."""
FITTED_PAIRS = 3
LEAST_GAIN = 0.005
FITTED_ROWS = 3_000
MOST_LEVELS = 16
"""Levels of a factor in a fit; numbers with more are put into so many classes."""
SHAPLEY_FACTORS = 6
SHAPLEY_CELLS = 50_000

Values = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Decomposition:
    """Shares of the metric's variance.

    Attributes:
        factors: what each explains alone; on a full grid exactly, elsewhere what nothing else explains as well.
        pairs: what two explain together beyond that; off a full grid of the pairs that explain most.
        shared: what several factors explain as well as each other; 0 on a full grid.
        rest: what is left: interactions of three and more, and noise.
        full: whether every combination was measured.
        rows: what the shares were computed from: cells of the full grid, or rows of the fit.
    """

    factors: dict[str, float]
    pairs: dict[tuple[str, str], float]
    shared: float
    rest: float
    full: bool
    rows: int


def decompose(codes: Mapping[str, Codes], y: Values, *, seed: int = 0) -> Decomposition:
    """Split the variance of `y` among factors and pairs of them.

    Args:
        codes: by factor the number of its level, row by row, from 0 on without gaps.
        y: the metric; it varies.
        seed: of the rows that are taken where there are more than `FITTED_ROWS` and no full grid.
    """
    cells = full_grid(codes, y)
    if cells is not None and cells.var() > 0:
        return _exact(list(codes), cells)
    return _fitted(codes, y, seed)


def full_grid(codes: Mapping[str, Codes], y: Values) -> Values | None:
    """The mean of the metric in each cell, an axis a factor, if every combination was measured."""
    shape = tuple(int(level.max()) + 1 for level in codes.values())
    if math.prod(shape) > len(y):
        return None
    index = np.ravel_multi_index(tuple(codes.values()), shape)
    counts = np.bincount(index, minlength=math.prod(shape))
    if not counts.all():
        return None
    return (np.bincount(index, y, minlength=len(counts)) / counts).reshape(shape)


def _marginal(cells: Values, axes: Sequence[int]) -> Values:
    """Means over all other axes, which stay with length 1."""
    return cells.mean(axis=tuple(set(range(cells.ndim)) - set(axes)), keepdims=True)


def _exact(names: Sequence[str], cells: Values) -> Decomposition:
    total = float(cells.var())
    centred = cells - cells.mean()
    alone = [_marginal(centred, [axis]) for axis in range(cells.ndim)]
    strongest = sorted(range(cells.ndim), key=lambda axis: -float(alone[axis].var()))[:PAIRED_FACTORS]
    pairs = {
        (names[one], names[other]): float((_marginal(centred, [one, other]) - alone[one] - alone[other]).var()) / total
        for one, other in itertools.combinations(sorted(strongest), 2)
    }
    factors = {name: float(effect.var()) / total for name, effect in zip(names, alone, strict=True)}
    rest = max(0.0, 1 - sum(factors.values()) - sum(pairs.values()))
    return Decomposition(factors, pairs, 0.0, rest, True, cells.size)


def _fitted(codes: Mapping[str, Codes], y: Values, seed: int) -> Decomposition:
    some = np.sort(np.random.default_rng(seed).permutation(len(y))[:FITTED_ROWS])
    y = y[some]
    columns = {name: _indicators(_classes(level[some])) for name, level in codes.items()}
    names = list(columns)
    main = _explained(list(columns.values()), y)
    factors = {
        name: max(0.0, main - _explained([columns[other] for other in names if other != name], y)) for name in names
    }
    shared = max(0.0, main - sum(factors.values()))
    strongest = sorted(names, key=lambda name: -_explained([columns[name]], y))[:PAIRED_FACTORS]
    products = {
        (one, other): (columns[one][:, :, None] * columns[other][:, None, :]).reshape(len(y), -1)
        for one, other in itertools.combinations([name for name in names if name in strongest], 2)
    }
    pairs = _gains(list(columns.values()), products, main, y)
    rest = max(0.0, 1 - max(main, sum(factors.values())) - sum(pairs.values()))
    return Decomposition(factors, pairs, shared, rest, False, len(y))


def _gains(
    fitted: list[Values], products: dict[tuple[str, str], Values], explained: float, y: Values
) -> dict[tuple[str, str], float]:
    """What the pairs that help most add to a fit of `fitted`, one after the other."""
    gains: dict[tuple[str, str], float] = {}
    for _ in range(min(FITTED_PAIRS, len(products))):
        reached = {pair: _explained([*fitted, product], y) for pair, product in products.items() if pair not in gains}
        best = max(reached, key=lambda pair: reached[pair])
        if reached[best] - explained < LEAST_GAIN:
            break
        gains[best] = reached[best] - explained
        explained = reached[best]
        fitted = [*fitted, products[best]]
    return gains


def _classes(level: Codes) -> Codes:
    """The same, with at most `MOST_LEVELS` levels of about as many rows each, and none empty."""
    if len(np.unique(level)) > MOST_LEVELS:
        ends = np.quantile(level, np.linspace(0, 1, MOST_LEVELS + 1)[1:-1])
        level = np.searchsorted(np.unique(ends), level)
    return np.unique(level, return_inverse=True)[1]


def _indicators(level: Codes) -> Values:
    """A column for each level but the first."""
    return (level[:, None] == np.arange(1, level.max() + 1)).astype(np.float64)


def _explained(columns: Sequence[Values], y: Values) -> float:
    """R^2 of a least-squares fit, adjusted for the number of columns: columns of noise explain nothing on average."""
    x = np.column_stack([np.ones(len(y)), *columns])
    gram = x.T @ x
    weights, _, rank, _ = np.linalg.lstsq(gram, x.T @ y, rcond=1e-10)
    free = len(y) - int(rank)
    if free <= 0:
        return 0.0
    left = float(((y - x @ weights) ** 2).sum()) / free
    return max(0.0, 1 - left / float(y.var(ddof=1)))


def shapley(names: Sequence[str], cells: Values) -> dict[str, float] | None:
    """Mean size of each factor's Shapley value over the cells of a full grid; None where that is too much work.

    What a set of factors is worth in a cell is the mean of the metric over all values of the others.
    """
    count = cells.ndim
    if count > SHAPLEY_FACTORS or cells.size > SHAPLEY_CELLS:
        return None
    worth = {
        axes: _marginal(cells, axes) for size in range(count + 1) for axes in itertools.combinations(range(count), size)
    }
    found = {}
    for own, name in enumerate(names):
        value = np.zeros_like(cells)
        for axes in worth:
            if own not in axes:
                weight = 1 / (count * math.comb(count - 1, len(axes)))
                value += weight * (worth[tuple(sorted((*axes, own)))] - worth[axes])
        found[name] = float(np.abs(value).mean())
    return found
