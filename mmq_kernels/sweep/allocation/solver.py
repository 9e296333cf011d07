"""The exact solution: one choice for each unit, least error in all, cost in all within a limit.

    minimize    sum_u error[u][c(u)]
    subject to  sum_u cost[u][c(u)] <= limit

is a multiple-choice knapsack. Dynamic programming over the units, last to first, keeps for the units behind each the
front of sums (cost, error) of which none is cheaper and better; nothing is rounded, so the optimum is exact. Fronts
stay short where costs are whole numbers with few different sums, as bits of equal blocks and microseconds are. On the
same fronts Lawler's partition enumerates the next best, each in logarithmic time.

Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11; Nemhauser and Ullmann, "Discrete dynamic
programming and capital allocation" (1969); Lawler, "A procedure for computing the k best solutions" (1972).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Row = Sequence[float] | Values
Table = Sequence[Row] | Values

Allocation = tuple[int, ...]
"""For each unit the index of its choice."""

SLACK = 1e-9
"""Share of the limit by which sums of floating-point costs may be off."""

MOST_SUMS = 4_000_000
"""In a front; costs with more different sums have to be rounded by who makes them."""

LOOK = 2_000
"""Solutions that are looked at for one that is far enough from all before."""


class SolverError(RuntimeError):
    """Costs with too many different sums."""


def total(table: Table, chosen: Allocation) -> float:
    """The sum over the units."""
    return float(sum(row[index] for row, index in zip(table, chosen, strict=True)))


def solve(errors: Table, costs: Table, limit: float) -> Allocation | None:
    """The allocation of least error within the limit; None where there is none. See `best`."""
    return next(best(errors, costs, limit), None)


def best(errors: Table, costs: Table, limit: float, *, apart: int = 1) -> Iterator[Allocation]:
    """Allocations within the limit, from the least error on.

    Args:
        errors, costs: for each unit a row of its choices' errors and costs; rows may differ in length.
        limit: of the costs' sum.
        apart: units in which each differs from all before it.

    Raises:
        ValueError: for tables of different shapes, or values that are not finite.
        SolverError: for costs with too many different sums.
    """
    _check(errors, costs)
    found: list[Allocation] = []
    ordered = _enumerate([np.asarray(row, float) for row in errors], [np.asarray(row, float) for row in costs],
                         limit + SLACK * abs(limit))  # fmt: skip
    while True:
        seen = islice(ordered, None if apart == 1 else LOOK)
        chosen = next((one for one in seen if all(_distance(one, other) >= apart for other in found)), None)
        if chosen is None:
            return
        if apart > 1:
            found.append(chosen)
        yield chosen


def _distance(one: Allocation, other: Allocation) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class _Front:
    """Sums over the units from one on, of which none is cheaper and better than another.

    Attributes:
        costs: ascending.
        errors: descending.
        choices, rest: of each sum the first unit's choice, and the place of what is left in the next front.
    """

    costs: Values
    errors: Values
    choices: npt.NDArray[np.int32]
    rest: npt.NDArray[np.int64]

    def place(self, budget: float) -> int:
        """Where the least error within a budget is; -1 where nothing is."""
        return int(np.searchsorted(self.costs, budget, side="right")) - 1


def _fronts(errors: list[Values], costs: list[Values], limit: float) -> list[_Front]:
    """For each unit the front of the sums from it on, and an empty sum behind the last."""
    fronts = [_Front(np.zeros(1), np.zeros(1), np.zeros(1, np.int32), np.zeros(1, np.int64))]
    least = np.cumsum([0.0, *(row.min() for row in costs)])
    for unit in range(len(errors) - 1, -1, -1):
        behind = fronts[-1]
        cost = (costs[unit][:, None] + behind.costs).ravel()
        error = (errors[unit][:, None] + behind.errors).ravel()
        choice = np.repeat(np.arange(len(costs[unit]), dtype=np.int32), len(behind.costs))
        rest = np.tile(np.arange(len(behind.costs)), len(costs[unit]))
        inside = np.flatnonzero(cost <= limit - least[unit])
        order = inside[np.lexsort((error[inside], cost[inside]))]
        lowest = np.minimum.accumulate(error[order])
        better = np.ones(len(order), bool)
        better[1:] = lowest[1:] < lowest[:-1]
        kept = order[better]
        if len(kept) > MOST_SUMS:
            raise SolverError(f"costs have too many different sums ({len(kept)} from unit {unit} on); round them")
        fronts.append(_Front(cost[kept], error[kept], choice[kept], rest[kept]))
    return fronts[::-1]


def _enumerate(errors: list[Values], costs: list[Values], limit: float) -> Iterator[Allocation]:
    """All allocations within the limit, least error first.

    A part of the solutions is those that begin like a known one, and differ from it in one unit: its best is the best
    of that unit's other choices with the best of what is behind. Once taken, it falls apart into such parts itself.
    """
    fronts = _fronts(errors, costs, limit)
    count, number = len(errors), 0
    heap: list[tuple[float, int, Allocation, int, float, float, frozenset[int]]] = []

    def follow(unit: int, place: int) -> Allocation:
        """The choices from a unit on."""
        chosen = []
        for front in fronts[unit:count]:
            chosen.append(int(front.choices[place]))
            place = int(front.rest[place])
        return tuple(chosen)

    def part(start: Allocation, spent: float, lost: float, banned: frozenset[int]) -> None:
        """Puts the best that begins with `start`, and goes on with none of the choices that are banned."""
        nonlocal number
        unit = len(start)
        options = []
        for index in range(len(costs[unit])):
            if index not in banned:
                place = fronts[unit + 1].place(limit - spent - costs[unit][index])
                if place >= 0:
                    options.append((lost + errors[unit][index] + fronts[unit + 1].errors[place], index, place))
        if options:
            error, index, place = min(options)
            number += 1
            heapq.heappush(heap, (error, number, (*start, index, *follow(unit + 1, place)), unit, spent, lost, banned))

    place = fronts[0].place(limit)
    if place < 0:
        return
    if not count:
        yield ()
        return
    part((), 0.0, 0.0, frozenset())
    while heap:
        _, _, chosen, unit, spent, lost, banned = heapq.heappop(heap)
        yield chosen
        part(chosen[:unit], spent, lost, banned | {chosen[unit]})
        for after in range(unit + 1, count):
            spent += float(costs[after - 1][chosen[after - 1]])
            lost += float(errors[after - 1][chosen[after - 1]])
            part(chosen[:after], spent, lost, frozenset({chosen[after]}))


def _check(errors: Table, costs: Table) -> None:
    shapes = [[len(row) for row in table] for table in (errors, costs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"errors and costs must have the same choices, got {shapes[0]} and {shapes[1]}")
    for name, table in (("errors", errors), ("costs", costs)):
        for unit, row in enumerate(table):
            if not len(row):
                raise ValueError(f"every unit must have a choice, got none for unit {unit}")
            if not np.isfinite(row).all():
                raise ValueError(f"{name} must be finite, got {list(row)} for unit {unit}")
