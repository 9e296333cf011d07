"""Which part matters, by several measures, with how far they agree; what each part costs alone; what is worth its size.

The importance of a factor is its share of a metric's variation, found by

- ``forest``: mean decrease in variance in a random forest whose splits see a third of the factors (Breiman 2001);
- ``permutation``: how much worse that forest predicts with the factor's column shuffled;
- ``variance``: ``Var(E[y | x_i])``, the factor alone (first-order effects of Sobol 1993). On a full grid interactions
  and noise are what is left; where factors were varied together, their effects overlap and may leave nothing.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmq_kernels.sweep.fronts import keeping, pareto
from mmq_kernels.sweep.store import Result

TREES = 300
ROWS_A_TREE = 5_000
ROWS_PERMUTED = 10_000
FOLDS = 5
LEAST_ROWS = 10
SHARES = (0.90, 0.95, 0.99)
UNTOUCHED = 16


@dataclass(frozen=True)
class Point:
    """One configuration: its place among the results analyzed, its cost, its score."""

    fingerprint: str
    factors: dict[str, float | str]
    cost: float
    value: float


@dataclass(frozen=True)
class Analysis:
    """What the results of one model, task and method say about one metric.

    Attributes:
        rows: results that hold the metric.
        constant: factors that never vary, with their value.
        importance: by measure, each factor's share; they sum to 1.
        interactions: share of the variance that no factor explains alone; see above.
        r2: cross-validated R^2 of the forest, mean of the folds.
        agreement: by pair of measures that rank the factors at all, Spearman's correlation of their ranks.
        alone: by factor (value, metric): the factor low, all others untouched.
        cost: what the front is against: "bpw" or "bytes".
        whole: the metric with everything untouched (the mean, if measured more than once), or the best there is.
        front: configurations that no other beats, by rising cost.
        keeps: by share of `whole` the least cost that keeps it, if any does.
    """

    model: str
    task: str
    method: str
    metric: str
    rows: int
    constant: dict[str, float | str]
    importance: dict[str, dict[str, float]]
    interactions: float
    r2: float
    agreement: dict[str, float]
    alone: dict[str, list[tuple[float, float]]]
    cost: str | None
    whole: float
    front: list[Point]
    keeps: dict[float, Point | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def analyze(results: Sequence[Result], metric: str, *, seed: int = 0) -> Analysis:
    """Analyze results of one model, task and method.

    Args:
        results: all with the same factors; those without the metric are left out.
        metric: of which more is better.
        seed: of forest, folds and shuffles.

    Raises:
        ValueError: for too few results, results of several models, tasks or methods, other factors in some, or nothing
            that varies.
    """
    kept = [result for result in results if metric in result.metrics]
    if len(kept) < LEAST_ROWS:
        there = ", ".join(sorted({name for result in results for name in result.metrics})) or "none"
        raise ValueError(f"{metric} is in {len(kept)} results, at least {LEAST_ROWS} are needed (metrics: {there})")
    model, task, method = (_only(kept, name) for name in ("model", "task", "method"))
    names = list(kept[0].factors)
    for result in kept:
        if result.factors.keys() != kept[0].factors.keys():
            raise ValueError(
                f"results must have the same factors; {kept[0].fingerprint} has {', '.join(names)}, "
                f"{result.fingerprint} has {', '.join(result.factors)}"
            )
    columns = {name: [result.factors[name] for result in kept] for name in names}
    constant = {name: values[0] for name, values in columns.items() if len(set(values)) == 1}
    varied = {name: _codes(values) for name, values in columns.items() if name not in constant}
    y = np.array([result.metrics[metric] for result in kept])
    if not varied or float(y.std()) == 0:
        raise ValueError(f"nothing to explain: {'no factor varies' if not varied else f'{metric} is always the same'}")
    x = np.column_stack(list(varied.values()))
    importance, r2 = _forest(x, y, list(varied), seed)
    alone_shares, interactions = _variance(varied, y)
    importance["variance"] = alone_shares
    cost, front, keeps, whole = _worth(kept, metric)
    return Analysis(
        model,
        task,
        method,
        metric,
        len(kept),
        constant,
        importance,
        interactions,
        r2,
        _agreement(importance, list(varied)),
        _alone(kept, metric),
        cost,
        whole,
        front,
        keeps,
    )


def _only(results: Sequence[Result], name: str) -> str:
    values = sorted({getattr(result, name) for result in results})
    if len(values) > 1:
        raise ValueError(f"results must be of one {name}, got {', '.join(values)}")
    return values[0]


def _codes(values: Sequence[float | str]) -> np.ndarray:
    """Numbers as they are; names by their order."""
    if any(isinstance(value, str) for value in values):
        order = {value: float(index) for index, value in enumerate(sorted({str(value) for value in values}))}
        return np.array([order[str(value)] for value in values])
    return np.array([float(value) for value in values])


def _shares(values: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Positive parts, as shares of their sum."""
    positive = np.maximum(values, 0)
    total = float(positive.sum()) or 1.0
    return {name: float(value) / total for name, value in zip(names, positive, strict=True)}


def _forest(x: np.ndarray, y: np.ndarray, names: Sequence[str], seed: int) -> tuple[dict[str, dict[str, float]], float]:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold, cross_val_score

    forest = RandomForestRegressor(
        TREES,
        max_features=max(1, len(names) // 3),
        max_samples=ROWS_A_TREE if len(y) > ROWS_A_TREE else None,
        random_state=seed,
        n_jobs=-1,
    )
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    r2 = float(np.mean(cross_val_score(forest, x, y, cv=folds, scoring="r2")))
    forest.fit(x, y)
    some = np.random.default_rng(seed).permutation(len(y))[:ROWS_PERMUTED]
    shuffled = permutation_importance(forest, x[some], y[some], n_repeats=5, random_state=seed)
    return {
        "forest": _shares(forest.feature_importances_, names),
        "permutation": _shares(shuffled.importances_mean, names),
    }, r2


def _variance(varied: dict[str, np.ndarray], y: np.ndarray) -> tuple[dict[str, float], float]:
    """Each factor's share of what the factors explain alone, and the share of the variance that is left."""
    effects = []
    for codes in varied.values():
        _, level = np.unique(codes, return_inverse=True)
        counts = np.bincount(level)
        means = np.bincount(level, y) / counts
        effects.append(float((counts * (means - y.mean()) ** 2).sum() / len(y)))
    left = 1 - sum(effects) / float(y.var())
    return _shares(np.array(effects), list(varied)), min(1.0, max(0.0, left))


def _agreement(importance: dict[str, dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    from scipy.stats import spearmanr

    shares = {measure: [values[name] for name in names] for measure, values in importance.items()}
    ranked = [measure for measure, values in shares.items() if len(set(values)) > 1]
    return {
        f"{one}, {other}": float(spearmanr(shares[one], shares[other]).statistic)
        for one, other in itertools.combinations(ranked, 2)
    }


def _alone(results: Sequence[Result], metric: str) -> dict[str, list[tuple[float, float]]]:
    """The mean of the metric at each value of a factor, all other numbers being untouched."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        numbers = {name: value for name, value in result.factors.items() if not isinstance(value, str)}
        low = [name for name, value in numbers.items() if value != UNTOUCHED]
        for name in low if len(low) == 1 else numbers if not low else ():
            found[name][numbers[name]].append(result.metrics[metric])
    return {
        name: [(value, float(np.mean(scores))) for value, scores in sorted(curve.items())]
        for name, curve in found.items()
    }


def _worth(results: Sequence[Result], metric: str) -> tuple[str | None, list[Point], dict[float, Point | None], float]:
    untouched = [
        result.metrics[metric]
        for result in results
        if all(value == UNTOUCHED for value in result.factors.values() if not isinstance(value, str))
    ]
    whole = float(np.mean(untouched)) if untouched else max(result.metrics[metric] for result in results)
    cost = next((name for name in ("bpw", "bytes") if all(getattr(r, name) is not None for r in results)), None)
    if cost is None:
        return None, [], {}, whole
    points = [
        Point(result.fingerprint, dict(result.factors), float(getattr(result, cost)), result.metrics[metric])
        for result in results
    ]
    costs, values = [point.cost for point in points], [point.value for point in points]
    keeps: dict[float, Point | None] = {}
    for share in SHARES:
        least = keeping(costs, values, share, whole)
        keeps[share] = None if least is None else points[least]
    return cost, [points[index] for index in pareto(costs, values)], keeps, whole
