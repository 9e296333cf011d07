"""What is worth its size: Pareto fronts, and the smallest configuration that keeps a share of a score."""

from __future__ import annotations

from collections.abc import Sequence


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
