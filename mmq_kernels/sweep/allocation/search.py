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

from mmq_kernels.sweep.allocation.sensitivity import Table
from mmq_kernels.sweep.allocation.solver import SLACK, Allocation, best, total

Errors = npt.NDArray[np.float64]
"""For each unit a row of its choices: what the choice adds to the loss."""

EXPONENTS = (0.5, 1.0, 2.0)
"""Of the errors in the sum: a small one keeps any unit from being given up, a large one looks at the worst."""

APART = 2
"""Units in which proposals of one error model differ."""

_RIDGE = 0.1
"""How strongly corrections are drawn to the one that fits all units alike, against relative errors of the sums."""

_TINY = 1e-12


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
        predicted: loss by the sum of the units' shares, as known when it was proposed.
        loss: of the whole quantized model.
        cost: in the budget's unit, of the whole quantized model; "inside" says whether it is within the budget.
    """

    candidate: Candidate
    predicted: float
    loss: float
    cost: float
    inside: bool
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> Allocation:
        return self.candidate.chosen


def error_models(table: Table, float_loss: float) -> dict[str, Errors]:
    """What each choice of each unit adds to the loss, by different readings of the same measurements.

    - "loss": as measured where it was measured. Elsewhere the block's output error times the loss that a unit of
      output error costs at the measured choice with the nearest output error.
    - "output": output error times one factor a unit, fitted to all its measured losses: steadier where small losses
      drown in noise.
    - "even": output error times one factor for all units: trusts the blocks' own errors alone.
    """
    slopes = [_slope(row, float_loss) for row in table]
    even = float(np.median([slope for slope in slopes if slope > 0] or [1.0]))
    models = {"loss": [], "output": [], "even": []}  # type: dict[str, list[list[float]]]
    for row, slope in zip(table, slopes, strict=True):
        outputs = [0.0 if one is None else one.output_error for one in row]
        models["output"].append([(slope or even * 1e-3) * error for error in outputs])
        models["even"].append([even * error for error in outputs])
        points = [
            (one.output_error, max(one.loss - float_loss, 0.0) / one.output_error)
            for one in row
            if one is not None and one.loss is not None and one.output_error > 0
        ]
        models["loss"].append([error * _nearest(points, error, slope or even * 1e-3) for error in outputs])
    return {name: np.maximum(np.asarray(rows), 0.0) for name, rows in models.items()}


def _slope(row: Sequence[Any], float_loss: float) -> float:
    """Loss a unit of output error, over all choices whose loss was measured; 0 where none lost anything."""
    known = [one for one in row if one is not None and one.loss is not None]
    outputs = sum(one.output_error for one in known)
    return max(sum(one.loss - float_loss for one in known), 0.0) / outputs if outputs > 0 else 0.0


def _nearest(points: Sequence[tuple[float, float]], error: float, otherwise: float) -> float:
    """The slope at the point whose output error is nearest, by ratio; one that is 0 (noise) gives way to the unit's."""
    if not points or error <= 0:
        return otherwise
    return min(points, key=lambda point: abs(np.log(point[0] / error)))[1] or otherwise


@dataclass
class Search:
    """Proposes allocations within a limit, and learns from those that were measured.

    Args:
        errors: by name of the error model.
        costs: for each unit a row of its choices' costs, as the budget counts.
        limit: of their sum.
        groups: indices of units that have to agree; see `units.grouped`.
        float_loss: of the float model.
        seconds: the solver may take for one proposal.
    """

    errors: Mapping[str, Errors]
    costs: Sequence[Sequence[float]]
    limit: float
    groups: Sequence[Sequence[int]]
    float_loss: float
    seconds: float = 60.0
    measured: list[Measured] = field(default_factory=list)
    _taken: set[Allocation] = field(default_factory=set)
    _weights: npt.NDArray[np.float64] | None = None

    def cost(self, chosen: Allocation) -> float:
        return total(self.costs, chosen)

    def predicted(self, chosen: Allocation) -> float:
        """Loss by the sum of the units' shares, corrected as far as there was something to learn from."""
        shares = np.array([row[index] for row, index in zip(self.errors["output"], chosen, strict=True)])
        return self.float_loss + float(shares @ (np.ones(len(shares)) if self._weights is None else self._weights))

    def uniform(self, names: Sequence[str]) -> Iterator[Candidate]:
        """Every choice given to all units alike, of those within the limit."""
        for index, name in enumerate(names):
            chosen = (index,) * len(self.costs)
            if self.cost(chosen) <= self.limit * (1 + SLACK):
                yield from self._new(chosen, f"uniform {name}")

    def by_component(self, components: Sequence[str], count: int) -> Iterator[Candidate]:
        """The best with one choice a component, by the sum of output errors."""
        members: dict[str, list[int]] = {}
        for index, component in enumerate(components):
            members.setdefault(component, []).append(index)
        found = self._best(self.errors["output"], list(members.values()), 1)
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
        table = self.errors["output"] * self._weights[:, None]
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
        for chosen in best(errors, costs, self.limit, apart=apart, seconds=self.seconds):
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
        """Each unit's correction: relative errors of the sums least, corrections near a common one, none negative."""
        table = self.errors["output"]
        rows = np.array([[row[i] for row, i in zip(table, one.chosen, strict=True)] for one in self.measured])
        lost = np.array([one.loss - self.float_loss for one in self.measured])
        floor = max(float(np.quantile(np.abs(lost), 0.1)), _TINY)
        scaled = rows / np.maximum(lost, floor)[:, None]
        target = np.maximum(lost, 0.0) / np.maximum(lost, floor)
        common = float(np.median(target / np.maximum(scaled.sum(1), _TINY)))
        importance = np.maximum(scaled.mean(0), _TINY)
        ridge = np.diag(np.sqrt(_RIDGE) * importance)
        fit = lsq_linear(np.vstack([scaled, ridge]), np.concatenate([target, ridge @ np.full(len(importance), common)]),
                         bounds=(0, np.inf))  # fmt: skip
        self._weights = fit.x

    def additivity(self) -> dict[str, float]:
        """How well plain sums foretold what was measured: rank correlation, and the median of measured over summed."""
        table = self.errors["output"]
        summed = np.array([total(table, one.chosen) for one in self.measured])
        lost = np.array([one.loss - self.float_loss for one in self.measured])
        if len(lost) < 3 or np.ptp(summed) == 0 or np.ptp(lost) == 0:
            return {"models": len(lost)}
        ratio = float(np.median(lost / np.maximum(summed, _TINY)))
        return {"models": len(lost), "rank_correlation": float(spearmanr(summed, lost)[0]), "measured_over_sum": ratio}


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


Score = Callable[[Candidate, float], Measured]
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
