"""What results of one model, task and method say about one metric: which part matters, and what is worth its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mmq_kernels.quantize.recipe import ALL, BLOCK_GROUPS, COMPONENTS
from mmq_kernels.sweep import curves, fronts
from mmq_kernels.sweep.curves import Curve, Level, Surface
from mmq_kernels.sweep.differences import Difference, against
from mmq_kernels.sweep.fronts import COSTS, SHARES, Point
from mmq_kernels.sweep.importance import importance
from mmq_kernels.sweep.predictions import Predictions
from mmq_kernels.sweep.store import Result
from mmq_kernels.sweep.variance import Codes, Values, decompose

LEAST_ROWS = 10
MOST_SURFACES = 6
MOST_TESTED = 60
"""Settings that are tested against everything left alone; the more there are the more each has to differ."""


@dataclass(frozen=True)
class Analysis:
    """What the results of one model, task and method say about one metric.

    Attributes:
        rows: results that hold the metric.
        constant: factors that never vary, with their value.
        importance: by measure, each factor's share; they sum to 1 (`sweep/importance.py` says what they are).
        consensus: mean of forest, permutation and Shapley values.
        left_out: by measure that is missing, why.
        interactions: share of the variance that no factor explains alone.
        decomposition: shares of the variance: of factors, of pairs as "one x other", "shared" by factors that were
            varied together, and the "rest" (interactions of three and more, and noise).
        full: whether every combination was measured: then the decomposition is exact.
        r2: cross-validated R^2 of the forest, mean of the folds.
        agreement: by pair of measures that rank the factors at all, Spearman's correlation of their ranks.
        alone: by factor (bits, metric), all other parts left alone.
        surfaces: the metric by the values of two factors, of the pairs that matter most.
        cost: what `front` and `keeps` are against: the first of bpw, bytes and latency that is known; None without.
        whole: the metric with everything untouched (the mean, if measured more than once), or the best there is.
        measured_whole: whether everything untouched was measured.
        front: configurations that no other beats, by rising cost.
        keeps: by share of `whole` the least cost that keeps it, if any does.
        fronts: by each known cost, its front.
        differences: settings of one low part, and those of `keeps`, against everything untouched.
    """

    model: str
    task: str
    method: str
    metric: str
    rows: int
    constant: dict[str, Level]
    importance: dict[str, dict[str, float]]
    consensus: dict[str, float]
    left_out: dict[str, str]
    interactions: float
    decomposition: dict[str, float]
    full: bool
    r2: float
    agreement: dict[str, float]
    alone: dict[str, Curve]
    surfaces: list[Surface]
    cost: str | None
    whole: float
    measured_whole: bool
    front: list[Point]
    keeps: dict[float, Point | None]
    fronts: dict[str, list[Point]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    @property
    def unanimous(self) -> bool:
        """Whether every measure puts the same factor first."""
        return len({max(shares, key=lambda name: shares[name]) for shares in self.importance.values()}) == 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def analyze(
    results: Sequence[Result], metric: str, *, seed: int = 0, predictions: Predictions | None = None
) -> Analysis:
    """Analyze results of one model, task and method.

    Args:
        results: all with the same factors; those without the metric are left out.
        metric: of which more is better, or `nll`.
        seed: of forest, folds, shuffles, samples of rows, and bootstrap.
        predictions: where per-sample predictions are read from; None for nowhere.

    Raises:
        ValueError: for too few results, results of several models, tasks or methods, other factors in some, or nothing
            that varies.
    """
    kept = [result for result in results if metric in result.metrics]
    if len(kept) < LEAST_ROWS:
        there = ", ".join(sorted({name for result in results for name in result.metrics})) or "none"
        raise ValueError(f"{metric} is in {len(kept)} results, at least {LEAST_ROWS} are needed (metrics: {there})")
    model, task, method = (_only(kept, name) for name in ("model", "task", "method"))
    constant, levels, columns, codes = _factors(kept)
    y = np.array([result.metrics[metric] for result in kept])
    if not columns or float(np.ptp(y)) == 0:
        raise ValueError(f"nothing to explain: {'no factor varies' if not columns else f'{metric} is always the same'}")
    found = importance(columns, codes, y, seed=seed)
    split = decompose(codes, y, seed=seed)
    order = sorted(found.consensus, key=lambda name: -found.consensus[name])
    untouched = [result for result in kept if fronts.untouched(result)]
    whole = _whole(kept, untouched, metric)
    drawn = {cost: points for cost in COSTS if (points := fronts.points(kept, metric, cost))}
    cost = next(iter(drawn), None)
    keeps = {} if cost is None else {share: fronts.least(drawn[cost], metric, share, whole) for share in SHARES}
    return Analysis(
        model=model,
        task=task,
        method=method,
        metric=metric,
        rows=len(kept),
        constant=constant,
        importance=found.shares,
        consensus=found.consensus,
        left_out=found.left_out,
        interactions=_beyond(codes, y),
        decomposition={
            **split.factors,
            **{f"{one} x {other}": share for (one, other), share in split.pairs.items()},
            **({} if split.full else {"shared": split.shared}),
            "rest": split.rest,
        },
        full=split.full,
        r2=found.r2,
        agreement=found.agreement,
        alone=dict(sorted(curves.alone(kept, metric).items(), key=lambda item: place(item[0]))),
        surfaces=curves.surfaces(levels, codes, y, order, MOST_SURFACES),
        cost=cost,
        whole=whole,
        measured_whole=bool(untouched),
        front=[] if cost is None else fronts.front(drawn[cost], metric),
        keeps=keeps,
        fronts={name: fronts.front(points, metric) for name, points in drawn.items()},
        differences=_differences(kept, untouched, keeps, metric, predictions or Predictions(), seed),
    )


def _only(results: Sequence[Result], name: str) -> str:
    values = sorted({getattr(result, name) for result in results})
    if len(values) > 1:
        raise ValueError(f"results must be of one {name}, got {', '.join(values)}")
    return values[0]


def _factors(
    results: Sequence[Result],
) -> tuple[dict[str, Level], dict[str, list[Level]], dict[str, Values], dict[str, Codes]]:
    """Constant factors; of the others their values, and row by row the value as a number and its place among them."""
    names = sorted(results[0].factors, key=place)
    for result in results:
        if result.factors.keys() != results[0].factors.keys():
            raise ValueError(
                f"results must have the same factors; {results[0].fingerprint} has {', '.join(names)}, "
                f"{result.fingerprint} has {', '.join(result.factors)}"
            )
    constant: dict[str, Level] = {}
    levels: dict[str, list[Level]] = {}
    columns, codes = {}, {}
    for name in names:
        values = [result.factors[name] for result in results]
        there: list[Level] = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        if len(there) == 1:
            constant[name] = there[0]
            continue
        order = {value: index for index, value in enumerate(there)}
        levels[name] = there
        codes[name] = np.array([order[value] for value in values])
        numbers = not any(isinstance(value, str) for value in there)
        columns[name] = np.array(values, dtype=np.float64) if numbers else codes[name].astype(np.float64)
    return constant, levels, columns, codes


def place(name: str) -> tuple[int, int, str]:
    """Components in the order of the pipeline, their blocks from first to last, then other factors by name."""
    part, _, third = name.partition(".")
    parts, thirds = (ALL, *COMPONENTS), ("", *BLOCK_GROUPS)
    return (
        parts.index(part) if part in parts else len(parts),
        thirds.index(third) if third in thirds else len(thirds),
        name,
    )


def _beyond(codes: dict[str, Codes], y: Values) -> float:
    """The share of the variance that no factor explains alone."""
    explained = 0.0
    for level in codes.values():
        counts = np.bincount(level)
        explained += float((counts * (np.bincount(level, y) / counts - y.mean()) ** 2).sum() / len(y))
    return min(1.0, max(0.0, 1 - explained / float(y.var())))


def _whole(results: Sequence[Result], untouched: Sequence[Result], metric: str) -> float:
    if untouched:
        return float(np.mean([result.metrics[metric] for result in untouched]))
    return max((result.metrics[metric] for result in results), key=lambda value: fronts.sign(metric) * value)


def _differences(
    results: Sequence[Result],
    untouched: Sequence[Result],
    keeps: dict[float, Point | None],
    metric: str,
    predictions: Predictions,
    seed: int,
) -> list[Difference]:
    """One low part, and what keeps a share of the score, against everything left alone."""
    if not untouched:
        return []
    kept = {point.fingerprint for point in keeps.values() if point is not None}
    chosen = [result for result in results if result.fingerprint in kept and not fronts.untouched(result)]
    single = [result for result in results if result.fingerprint not in kept and fronts.lowered(result) == 1]
    return against([*chosen, *single][:MOST_TESTED], untouched[0], metric, predictions, seed=seed)
