"""Which factor matters, by several measures, and how far they agree.

The importance of a factor is its share of a metric's variation, found by

- ``forest``: mean decrease in variance in a random forest whose splits see a third of the factors (Breiman 2001);
- ``permutation``: how much worse that forest predicts with the factor's column shuffled;
- ``shap``: mean size of the factor's contribution to the forest's predictions (Lundberg et al. 2020), by the `shap`
  package where that is installed;
- ``shapley``: the same of the measured values themselves, exactly, where every combination was measured;
- ``variance``: ``Var(E[y | x_i])``, the factor alone (first-order effects of Sobol 1993). Where factors were varied
  together, their effects overlap.

Their ``consensus`` is the mean of forest, permutation and Shapley values, which gives what arXiv 2601.15287 prints.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmq_kernels.sweep.variance import Codes, Values, full_grid, shapley

TREES = 300
TREES_OF_MANY = 100
"""Trees of a forest of many rows, each of which sees more than a tree of few."""
MANY_ROWS = 1_000
FOLDS = 5
TREES_A_FOLD = 50
TREES_EXPLAINED = 60
FOREST_ROWS = 8_000
"""Rows that forest and folds see; of more a seeded sample."""
ROWS_A_TREE = 2_000
ROWS_PERMUTED = 500
ROWS_EXPLAINED = 128
ROWS_AN_EXPLAINED_TREE = 512
"""The work of `shap` grows with the leaves; of more rows a forest of smaller trees is explained."""
REPEATS = 5
THREADED_ROWS = 2_000
"""From here on a forest is worth the start of threads."""
NO_SHAP = "the package shap is not installed (pip install 'mmq_kernels[analysis]')"


@dataclass(frozen=True)
class Importance:
    """Shares of the factors.

    Attributes:
        shares: by measure, each factor's share; they sum to 1.
        consensus: mean of forest, permutation and Shapley values (the package's where it is there, else the grid's).
        r2: cross-validated R^2 of the forest, mean of the folds.
        agreement: by pair of measures that rank the factors at all, Spearman's correlation of their ranks.
        left_out: by measure that is missing, why.
        rows: how many the forest saw.
    """

    shares: dict[str, dict[str, float]]
    consensus: dict[str, float]
    r2: float
    agreement: dict[str, float]
    left_out: dict[str, str]
    rows: int


def importance(columns: Mapping[str, Values], codes: Mapping[str, Codes], y: Values, *, seed: int = 0) -> Importance:
    """Importance of each factor.

    Args:
        columns: by factor its value, row by row, as a number.
        codes: by factor the number of its level.
        y: the metric; it varies.
        seed: of sample, forest, folds and shuffles.
    """
    names = list(columns)
    some = np.sort(np.random.default_rng(seed).permutation(len(y))[:FOREST_ROWS])
    x, known = np.column_stack([columns[name][some] for name in names]), y[some]
    forest = _grown(x, known, TREES if len(known) <= MANY_ROWS else TREES_OF_MANY, ROWS_A_TREE, seed)
    shares = {
        "forest": _shares(forest.feature_importances_, names),
        "permutation": _shares(_permutation(forest, x, known, seed), names),
    }
    left_out = {}
    if importlib.util.find_spec("shap") is None:
        left_out["shap"] = NO_SHAP
    else:
        shares["shap"] = _shares(_shap(x, known, seed), names)
    cells = full_grid(codes, y)
    exact = None if cells is None else shapley(names, cells)
    if exact is not None:
        shares["shapley"] = _shares(np.array([exact[name] for name in names]), names)
    else:
        left_out["shapley"] = "not every combination was measured" if cells is None else "the grid is too large for it"
    shares["variance"] = _shares(np.array([_first_order(level, y) for level in codes.values()]), names)
    return Importance(
        shares, _consensus(shares, names), _r2(x, known, seed), _agreement(shares, names), left_out, len(some)
    )


def _shares(values: Values, names: Sequence[str]) -> dict[str, float]:
    """Positive parts, as shares of their sum."""
    positive = np.maximum(values, 0)
    total = float(positive.sum()) or 1.0
    return {name: float(value) / total for name, value in zip(names, positive, strict=True)}


def _grown(x: Values, y: Values, trees: int, rows: int, seed: int) -> Any:
    """A forest whose trees see a third of the factors at a split, and at most so many rows each."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(
        trees,
        max_features=max(1, x.shape[1] // 3),
        max_samples=rows if len(y) > rows else None,
        random_state=seed,
        n_jobs=-1 if len(y) > THREADED_ROWS else 1,
    )
    return forest.fit(x, y)


def _r2(x: Values, y: Values, seed: int) -> float:
    """Mean R^2 of smaller forests on the folds that they have not seen."""
    from sklearn.model_selection import KFold

    found = []
    for seen, unseen in KFold(FOLDS, shuffle=True, random_state=seed).split(x):
        found.append(_grown(x[seen], y[seen], TREES_A_FOLD, ROWS_A_TREE, seed).score(x[unseen], y[unseen]))
    return float(np.mean(found))


def _permutation(forest: Any, x: Values, y: Values, seed: int) -> Values:
    """By how much the mean square of the forest's error grows with each column shuffled; all is predicted at once."""
    draw = np.random.default_rng(seed)
    some = draw.permutation(len(x))[:ROWS_PERMUTED]
    count, width = len(some), x.shape[1]
    copies = np.tile(x[some], (1 + width * REPEATS, 1)).reshape(1 + width * REPEATS, count, width)
    for copy, column in enumerate(np.repeat(np.arange(width), REPEATS), 1):
        copies[copy, :, column] = copies[0, draw.permutation(count), column]
    errors = (forest.predict(copies.reshape(-1, width)).reshape(-1, count) - y[some]) ** 2
    worse = errors.mean(1)[1:] - errors[0].mean()
    return worse.reshape(width, REPEATS).mean(1)


def _shap(x: Values, y: Values, seed: int) -> Values:
    """Of a forest like the other, with fewer trees, on a sample of the rows."""
    import shap

    forest = _grown(x, y, TREES_EXPLAINED, ROWS_AN_EXPLAINED_TREE, seed)
    some = np.random.default_rng(seed).permutation(len(x))[:ROWS_EXPLAINED]
    return np.abs(shap.TreeExplainer(forest).shap_values(x[some], check_additivity=False)).mean(0)


def _first_order(level: Codes, y: Values) -> float:
    counts = np.bincount(level)
    means = np.bincount(level, y) / counts
    return float((counts * (means - y.mean()) ** 2).sum() / len(y))


def _consensus(shares: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    contribution = next((measure for measure in ("shap", "shapley") if measure in shares), None)
    used = [measure for measure in ("forest", "permutation", contribution) if measure is not None]
    return {name: float(np.mean([shares[measure][name] for measure in used])) for name in names}


def _agreement(shares: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    from scipy.stats import spearmanr

    ordered = {measure: [values[name] for name in names] for measure, values in shares.items()}
    ranked = [measure for measure, values in ordered.items() if len(set(values)) > 1]
    return {
        f"{one}, {other}": float(spearmanr(ordered[one], ordered[other]).statistic)
        for one, other in itertools.combinations(ranked, 2)
    }
