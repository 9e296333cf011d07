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
FOLDS = 5
TREES_A_FOLD = 100
TREES_EXPLAINED = 100
FOREST_ROWS = 10_000
"""Rows that forest and folds see; of more a seeded sample."""
ROWS_A_TREE = 4_000
ROWS_PERMUTED = 2_000
ROWS_EXPLAINED = 256
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
    forest, r2 = _forest(x, known, seed)
    shares = {
        "forest": _shares(forest.feature_importances_, names),
        "permutation": _shares(_permutation(forest, x, known, seed), names),
    }
    left_out = {}
    if importlib.util.find_spec("shap") is None:
        left_out["shap"] = NO_SHAP
    else:
        shares["shap"] = _shares(_shap(forest, x, seed), names)
    cells = full_grid(codes, y)
    exact = None if cells is None else shapley(names, cells)
    if exact is not None:
        shares["shapley"] = _shares(np.array([exact[name] for name in names]), names)
    else:
        left_out["shapley"] = "not every combination was measured" if cells is None else "the grid is too large for it"
    shares["variance"] = _shares(np.array([_first_order(level, y) for level in codes.values()]), names)
    return Importance(shares, _consensus(shares, names), r2, _agreement(shares, names), left_out, len(some))


def _shares(values: Values, names: Sequence[str]) -> dict[str, float]:
    """Positive parts, as shares of their sum."""
    positive = np.maximum(values, 0)
    total = float(positive.sum()) or 1.0
    return {name: float(value) / total for name, value in zip(names, positive, strict=True)}


def _forest(x: Values, y: Values, seed: int) -> tuple[Any, float]:
    """A forest of all rows, and the mean R^2 of smaller ones on the folds that they have not seen."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold, cross_val_score

    def forest(trees: int, rows: int) -> RandomForestRegressor:
        return RandomForestRegressor(
            trees,
            max_features=max(1, x.shape[1] // 3),
            max_samples=ROWS_A_TREE if rows > ROWS_A_TREE else None,
            random_state=seed,
            n_jobs=-1 if rows > THREADED_ROWS else 1,
        )

    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    seen = len(y) * (FOLDS - 1) // FOLDS
    r2 = cross_val_score(forest(TREES_A_FOLD, seen), x, y, cv=folds, scoring="r2")
    return forest(TREES, len(y)).fit(x, y), float(np.mean(r2))


def _permutation(forest: Any, x: Values, y: Values, seed: int) -> Values:
    from sklearn.inspection import permutation_importance

    some = np.random.default_rng(seed).permutation(len(y))[:ROWS_PERMUTED]
    return permutation_importance(forest, x[some], y[some], n_repeats=REPEATS, random_state=seed).importances_mean


def _shap(forest: Any, x: Values, seed: int) -> Values:
    """Of the first trees, which are a forest too, on a sample of the rows."""
    import shap
    from sklearn.ensemble import RandomForestRegressor

    fewer = RandomForestRegressor(TREES_EXPLAINED)
    fewer.__dict__ |= forest.__dict__ | {"estimators_": forest.estimators_[:TREES_EXPLAINED]}
    some = np.random.default_rng(seed).permutation(len(x))[:ROWS_EXPLAINED]
    return np.abs(shap.TreeExplainer(fewer).shap_values(x[some], check_additivity=False)).mean(0)


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
