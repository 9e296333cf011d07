"""From sensitivities to an allocation: error models, the shortlist that is really measured, and what was learnt of it.

That the losses of units add up is an assumption. It is what the first proposals are made of; then whole models are
quantized and scored, each unit's share is corrected until the sums fit what was measured, and the corrected sums make
the next proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear
from scipy.stats import spearmanr

from mmq_kernels.sweep.allocation.sensitivity import Sensitivity, Table
from mmq_kernels.sweep.allocation.solver import SLACK, Allocation, best, total

Errors = npt.NDArray[np.float64]
"""For each unit a row of its choices: what the choice adds to the loss."""

EXPONENTS = (0.5, 1.0, 2.0)
"""Of the errors in the sum: a small one keeps any unit from being given up, a large one looks at the worst."""

MEASURED = "model"
"""The error model that corrections start from."""

MOST_EXPONENT = 4.0
"""Of losses as powers of sums; and one over it the least."""

APART = 2
"""Units in which proposals of one error model differ."""

_RIDGE = 1.0
"""How strongly corrections are drawn to the one that fits all units alike, against relative errors of the sums."""

_TINY = 1e-12

_FLOOR = 0.2
"""Share of the median below which what was lost counts as that share: noise, which may be below zero."""

_SPREAD = 0.1
"""Of logarithms of sums, from which on an exponent can be fitted."""


@dataclass(frozen=True)
class Candidate:
    """An allocation to be quantized and scored.

    Attributes:
        chosen: for each unit the index of its choice.
        why: what proposed it, such as "uniform 3bit:g64:asym".
        uniform: whether all units have the same choice.
    """

    chosen: Allocation
    why: str
    uniform: bool = False


@dataclass
class Measured:
    """A candidate that was quantized and scored.

    Attributes:
        predicted: loss by the sum of the units' shares, as known when it was proposed; None at first.
        loss: of the whole quantized model.
        cost: in the budget's unit, of the whole quantized model; "inside" says whether it is within the budget.
    """

    candidate: Candidate
    predicted: float | None
    loss: float
    cost: float
    inside: bool
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> Allocation:
        return self.candidate.chosen


def error_models(table: Table) -> dict[str, Errors]:
    """What each choice of each unit adds to the deviation of the model's output, by different readings.

    - "model": as measured on the whole model. Elsewhere the block's output error times what a unit of output error
      makes of the model's output at the measured choice with the nearest output error.
    - "block": output error times one factor a unit, fitted to all its measurements on the whole model.
    - "even": output error times one factor for all units: trusts the blocks' own errors alone.
    """
    slopes = [_slope(row) for row in table]
    even = float(np.median([slope for slope in slopes if slope > 0] or [1.0]))
    models: dict[str, list[list[float]]] = {"model": [], "block": [], "even": []}
    for row, slope in zip(table, slopes, strict=True):
        outputs = [0.0 if one is None else one.output_error for one in row]
        points = [
            (one.output_error, one.deviation / one.output_error)
            for one in row
            if one is not None and one.deviation is not None and one.output_error > 0
        ]
        models["model"].append([error * _nearest(points, error, slope or even) for error in outputs])
        models["block"].append([error * (slope or even) for error in outputs])
        models["even"].append([error * even for error in outputs])
    return {name: np.asarray(rows) for name, rows in models.items()}


def _slope(row: Sequence[Sensitivity | None]) -> float:
    """Deviation of the model a unit of output error, over all choices measured so; 0 where none was."""
    known = [(one.output_error, one.deviation) for one in row if one is not None and one.deviation is not None]
    outputs = sum(output for output, _ in known)
    return sum(deviation for _, deviation in known) / outputs if outputs > 0 else 0.0


def _nearest(points: Sequence[tuple[float, float]], error: float, otherwise: float) -> float:
    """The factor at the point whose output error is nearest, by ratio."""
    if not points or error <= 0:
        return otherwise
    return min(points, key=lambda point: abs(np.log(point[0] / error)))[1]


@dataclass
class Search:
    """Proposes allocations within a limit, and learns from those that were measured.

    Args:
        errors: by name of the error model.
        costs: for each unit a row of its choices' costs, as the budget counts.
        limit: of their sum.
        groups: indices of units that have to agree; see `units.grouped`.
        float_loss: of the float model.
    """

    errors: Mapping[str, Errors]
    costs: Sequence[Sequence[float]]
    limit: float
    groups: Sequence[Sequence[int]]
    float_loss: float
    measured: list[Measured] = field(default_factory=list)
    _taken: set[Allocation] = field(default_factory=set)
    _weights: npt.NDArray[np.float64] | None = None
    _power: tuple[float, float] = (1.0, 1.0)

    def cost(self, chosen: Allocation) -> float:
        return total(self.costs, chosen)

    def predicted(self, chosen: Allocation) -> float | None:
        """Loss by the sum of the units' shares, as far as there was something to learn from; until then None."""
        if self._weights is None:
            return None
        scale, exponent = self._power
        return self.float_loss + scale * float(self._shares([chosen])[0] @ self._weights) ** exponent

    def uniform(self, names: Sequence[str]) -> Iterator[Candidate]:
        """Every choice given to all units alike, of those within the limit."""
        for index, name in enumerate(names):
            chosen = (index,) * len(self.costs)
            if self.cost(chosen) <= self.limit * (1 + SLACK):
                yield from self._new(chosen, f"uniform {name}")

    def by_component(self, components: Sequence[str], count: int) -> Iterator[Candidate]:
        """The best with one choice a component, by the sum of deviations."""
        members: dict[str, list[int]] = {}
        for index, component in enumerate(components):
            members.setdefault(component, []).append(index)
        found = self._best(self.errors[MEASURED], list(members.values()), 1)
        yield from self._some(found, "one width a component", count)

    def first(self, count: int) -> Iterator[Candidate]:
        """Optima of every error model with every exponent, the models taking turns."""
        turns = []
        for exponent in sorted(EXPONENTS, key=lambda power: abs(power - 1.0)):
            for name, table in self.errors.items():
                found = self._best(table**exponent, self.groups, APART)
                turns.append(self._some(found, f"error model {name}, exponent {exponent:g}", 1))
        fresh = (candidate for turn in turns for candidate in turn)
        yield from islice(fresh, count)

    def next(self, count: int) -> Iterator[Candidate]:
        """The best by the corrected sums that were not measured yet, and the best in the neighbourhood of the best."""
        self._learn()
        assert self._weights is not None
        table = self.errors[MEASURED] * self._weights[:, None]
        ways = [self._some(self._best(table, self.groups, 1), "corrected sums", count), self._around(table)]
        yield from islice(_alternating(ways), count)

    def _around(self, table: Errors) -> Iterator[Candidate]:
        """Swaps around the best so far: one group of units changed, or two, by the corrected sums the best first."""
        inside = [one for one in self.measured if one.inside]
        if not inside:
            return
        start = min(inside, key=lambda one: one.loss).chosen
        moves = [
            (group, index)
            for group in self.groups
            for index in range(len(self.costs[group[0]]))
            if index != start[group[0]]
        ]
        found: dict[Allocation, float] = {}
        for i, first in enumerate(moves):
            for second in moves[i:]:
                if second[0] is not first[0] or second is first:
                    chosen = _moved(_moved(start, *first), *second)
                    if self.cost(chosen) <= self.limit * (1 + SLACK):
                        found[chosen] = total(table, chosen)
        for chosen in sorted(found, key=lambda one: found[one]):
            yield from self._new(chosen, "neighbour of the best")

    def _best(self, table: Errors, groups: Sequence[Sequence[int]], apart: int) -> Iterator[Allocation]:
        """Optima of a table where the units of a group agree."""
        costs = [np.sum([self.costs[unit] for unit in group], axis=0).tolist() for group in groups]
        errors = [np.sum([table[unit] for unit in group], axis=0).tolist() for group in groups]
        apart = min(apart, len(groups))
        for chosen in best(errors, costs, self.limit, apart=apart):
            full = [0] * len(self.costs)
            for group, index in zip(groups, chosen, strict=True):
                for unit in group:
                    full[unit] = index
            yield tuple(full)

    def _some(self, found: Iterator[Allocation], why: str, count: int) -> Iterator[Candidate]:
        """The first new ones; not looking further than a few times as many."""
        fresh = (candidate for chosen in islice(found, 4 * count) for candidate in self._new(chosen, why))
        yield from islice(fresh, count)

    def _new(self, chosen: Allocation, why: str) -> Iterator[Candidate]:
        if chosen not in self._taken:
            self._taken.add(chosen)
            yield Candidate(chosen, why, uniform=len(set(chosen)) == 1)

    def _learn(self) -> None:
        """The loss as a power of the sum, and each unit's correction in it.

        Corrections make relative errors of the sums least, are drawn to 1, and never negative.
        """
        rows = self._shares([one.chosen for one in self.measured])
        lost = self._lost()
        self._power = _power_law(rows.sum(1), lost)
        target = _inverse(self._power, lost)
        scaled = rows / target[:, None]
        ridge = np.diag(np.sqrt(_RIDGE) * np.maximum(scaled.mean(0), _TINY))
        wanted = np.concatenate([np.ones(len(rows)), ridge.sum(1)])
        self._weights = lsq_linear(np.vstack([scaled, ridge]), wanted, bounds=(0, np.inf)).x

    def _shares(self, allocations: Sequence[Allocation]) -> npt.NDArray[np.float64]:
        table = self.errors[MEASURED]
        return np.array([[row[i] for row, i in zip(table, chosen, strict=True)] for chosen in allocations])

    def _lost(self) -> npt.NDArray[np.float64]:
        """What quantizing cost, of every measured model."""
        lost = np.array([one.loss - self.float_loss for one in self.measured])
        return np.maximum(lost, max(float(np.median(np.abs(lost))) * _FLOOR, _TINY))

    def additivity(self) -> dict[str, float]:
        """How well the plain sums order what was measured."""
        if len(self.measured) < 3:
            return {"models": len(self.measured)}
        summed = self._shares([one.chosen for one in self.measured]).sum(1)
        lost = np.array([one.loss for one in self.measured])
        if np.ptp(summed) == 0 or np.ptp(lost) == 0:
            return {"models": len(lost)}
        return {"models": len(lost), "rank_correlation": float(spearmanr(summed, lost)[0])}


def _power_law(sums: npt.NDArray[np.float64], lost: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Scale and exponent of ``lost = scale * sums ** exponent``, by least squares of logarithms."""
    x, y = np.log(np.maximum(sums, _TINY)), np.log(lost)
    exponent = float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > _SPREAD else 1.0
    exponent = min(max(exponent, 1 / MOST_EXPONENT), MOST_EXPONENT)
    return float(np.exp(np.median(y - exponent * x))), exponent


def _inverse(power: tuple[float, float], lost: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    scale, exponent = power
    return (lost / scale) ** (1 / exponent)


def _moved(chosen: Allocation, group: Sequence[int], index: int) -> Allocation:
    return tuple(index if unit in group else now for unit, now in enumerate(chosen))


def _alternating(ways: Sequence[Iterator[Candidate]]) -> Iterator[Candidate]:
    """One from each in turn, as long as there are any."""
    open_ways = list(ways)
    while open_ways:
        for way in list(open_ways):
            candidate = next(way, None)
            if candidate is None:
                open_ways.remove(way)
            else:
                yield candidate


Score = Callable[[Candidate, float | None], Measured]
"""Quantizes and scores a candidate, told its predicted loss."""


def run(
    search: Search,
    score: Score,
    *,
    names: Sequence[str],
    components: Sequence[str],
    count: int,
    a_round: int = 4,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Score the uniform allocations, then proposals until `count` models have been scored beside them.

    Args:
        names: of the choices.
        components: of each unit.
        count: of models that are not uniform.
        a_round: proposals between two corrections.
    """
    uniform = list(search.uniform(names))
    in_all = len(uniform) + count

    def take(candidates: Iterator[Candidate] | Sequence[Candidate]) -> int:
        taken = 0
        for candidate in list(candidates):
            search.measured.append(score(candidate, search.predicted(candidate.chosen)))
            taken += 1
            if progress:
                progress(len(search.measured), in_all, candidate.why)
        return taken

    take(uniform)
    left = count
    left -= take(islice(search.by_component(components, max(1, count // 8)), left))
    left -= take(search.first(min(left, max(1, count // 2))))
    while left > 0 and (taken := take(search.next(min(left, a_round)))):
        left -= taken
