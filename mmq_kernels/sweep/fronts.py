"""What is worth its size: Pareto fronts, and the smallest configuration that keeps a share of a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmq_kernels.quantize.recipe import ALL, COMPONENTS
from mmq_kernels.quantize.recipe import LEFT_ALONE as UNTOUCHED
from mmq_kernels.sweep.store import Result

COSTS = ("bpw", "bytes", "latency")
"""What a configuration costs, by the names of `Result`: bits a weight, bytes, seconds a sample."""
SHARES = (0.90, 0.95, 0.99)
LOWER_IS_BETTER = ("nll",)


@dataclass(frozen=True)
class Point:
    """One configuration: its place among the results analyzed, its cost, its score."""

    fingerprint: str
    factors: dict[str, float | str]
    cost: float
    value: float
    recipe: str = ""


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats (no cost above theirs and no value below, one of both better).

    In order of cost; of equal points the first.
    """
    if len(costs) != len(values):
        raise ValueError(f"costs and values must be as many, got {len(costs)} and {len(values)}")
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front


def keeping(costs: Sequence[float], values: Sequence[float], share: float, whole: float) -> int | None:
    """Index of the least cost whose value is at least `share` of `whole`, of equal costs the best; None if none is."""
    enough = [index for index, value in enumerate(values) if value >= share * whole]
    return min(enough, key=lambda index: (costs[index], -values[index]), default=None)


def sign(metric: str) -> int:
    """1 where more of the metric is better, -1 where less is."""
    return -1 if metric in LOWER_IS_BETTER else 1


def untouched(result: Result) -> bool:
    """Whether every factor that is a number of bits leaves its part alone."""
    return bool(result_bits(result)) and lowered(result) == 0


def lowered(result: Result) -> int:
    """How many parts have fewer bits than they came with."""
    return sum(value != UNTOUCHED for value in result_bits(result).values())


def result_bits(result: Result) -> dict[str, float]:
    """The factors that are bits of a component or of a third of its blocks."""
    return {
        name: value
        for name, value in result.factors.items()
        if not isinstance(value, str) and name.split(".")[0] in (*COMPONENTS, ALL)
    }


def points(results: Sequence[Result], metric: str, cost: str) -> list[Point]:
    """The results that say what they cost, in their order."""
    return [
        Point(result.fingerprint, dict(result.factors), float(spent), result.metrics[metric], result.recipe)
        for result in results
        if (spent := getattr(result, cost)) is not None
    ]


def front(candidates: Sequence[Point], metric: str) -> list[Point]:
    """The candidates that no other beats, by rising cost."""
    values = [sign(metric) * point.value for point in candidates]
    return [candidates[index] for index in pareto([point.cost for point in candidates], values)]


def least(candidates: Sequence[Point], metric: str, share: float, whole: float) -> Point | None:
    """The cheapest that keeps a share of the `whole` score; of a metric that is to be low, at most `whole / share`."""
    costs, values = [point.cost for point in candidates], [point.value for point in candidates]
    if sign(metric) > 0:
        found = keeping(costs, values, share, whole)
    else:
        found = keeping(costs, [-value for value in values], 1 / share, -whole)
    return None if found is None else candidates[found]
