"""The exact solution: one choice for each unit, least error in all, cost in all within a limit.

    minimize    sum_u error[u][c(u)]
    subject to  sum_u cost[u][c(u)] <= limit

is a multiple-choice knapsack; HiGHS (`scipy.optimize.milp`) solves it to optimality. Further solutions, each at least
so many units apart from all before, come from no-good cuts.

Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Row = Sequence[float] | npt.NDArray[np.float64]
Table = Sequence[Row] | npt.NDArray[np.float64]
Allocation = tuple[int, ...]
"""For each unit the index of its choice."""

SLACK = 1e-9
"""Of the limit, by which sums of floating-point costs may be off."""

_SCALE = 1e3
"""Errors are scaled so that the first feasible solution has this sum: far above HiGHS's absolute gap of 1e-6."""

_OPTIMAL, _INFEASIBLE = 0, 2


class SolverError(RuntimeError):
    """No proof of optimality within the time limit."""


def total(table: Table, chosen: Allocation) -> float:
    """The sum over the units."""
    return float(sum(row[index] for row, index in zip(table, chosen, strict=True)))


def cheapest(costs: Table, errors: Table) -> Allocation:
    """The allocation of least cost, of those the one of least error."""
    return tuple(min(range(len(c)), key=lambda i: (c[i], e[i])) for c, e in zip(costs, errors, strict=True))


def solve(
    errors: Table,
    costs: Table,
    limit: float,
    *,
    without: Sequence[Allocation] = (),
    apart: int = 1,
    seconds: float = 60.0,
) -> Allocation | None:
    """The allocation of least error within the limit.

    Args:
        errors, costs: for each unit a row of its choices' errors and costs; rows may differ in length.
        limit: of the costs' sum.
        without: allocations from each of which the solution has to differ in at least `apart` units.
        seconds: HiGHS may take.

    Returns:
        An optimum, or None where nothing is within the limit.

    Raises:
        ValueError: for tables of different shapes, or values that are not finite.
        SolverError: where the time was up before optimality was proven.
    """
    _check(errors, costs)
    if not errors:
        return None if without else ()
    start = cheapest(costs, errors)
    if total(costs, start) > limit * (1 + SLACK):
        return None
    starts = np.cumsum([0, *(len(row) for row in errors)])
    least = [min(row) for row in errors]
    value = np.concatenate([np.asarray(row, float) - low for row, low in zip(errors, least, strict=True)])
    weight = np.concatenate([np.asarray(row, float) for row in costs])
    value *= _SCALE / (_greedy(errors, costs, limit, start) - sum(least) or 1.0)
    units = np.repeat(np.arange(len(errors)), np.diff(starts))
    one_each = csr_array((np.ones(len(value)), (units, np.arange(len(value)))))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(weight / limit, -np.inf, 1 + SLACK)]
    if without:
        taken = np.zeros((len(without), len(value)))
        for row, chosen in zip(taken, without, strict=True):
            row[starts[:-1] + np.asarray(chosen)] = 1
        constraints.append(LinearConstraint(taken, -np.inf, len(errors) - apart))
    while True:
        found = milp(
            value,
            integrality=np.ones(len(value)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": seconds},
        )
        if found.status == _INFEASIBLE:
            return None
        if found.status != _OPTIMAL:
            raise SolverError(f"no optimum was proven within {seconds:g} s ({found.message})")
        chosen = tuple(int(found.x[a:b].argmax()) for a, b in pairwise(starts))
        if total(costs, chosen) <= limit * (1 + SLACK):
            return chosen
        # Within HiGHS's tolerance of the limit, and still above it: that one allocation is cut off.
        row = np.zeros(len(value))
        row[starts[:-1] + np.asarray(chosen)] = 1
        constraints.append(LinearConstraint(row, -np.inf, len(errors) - 1))


def best(errors: Table, costs: Table, limit: float, *, apart: int = 1, seconds: float = 60.0) -> Iterator[Allocation]:
    """Allocations within the limit, from the least error on, each at least `apart` units away from all before."""
    found: list[Allocation] = []
    while (chosen := solve(errors, costs, limit, without=found, apart=apart, seconds=seconds)) is not None:
        found.append(chosen)
        yield chosen


def _greedy(errors: Table, costs: Table, limit: float, start: Allocation) -> float:
    """The error of a feasible allocation: from the cheapest, the swap that saves most for its cost, while one fits."""
    chosen = list(start)
    room = limit - total(costs, start)
    while True:
        swaps = [
            ((e[now] - e[i]) / max(c[i] - c[now], 1e-300), unit, i)
            for unit, (now, e, c) in enumerate(zip(chosen, errors, costs, strict=True))
            for i in range(len(e))
            if e[i] < e[now] and c[i] - c[now] <= room
        ]
        if not swaps:
            return total(errors, tuple(chosen))
        _, unit, i = max(swaps)
        room -= costs[unit][i] - costs[unit][chosen[unit]]
        chosen[unit] = i


def _check(errors: Table, costs: Table) -> None:
    if [len(row) for row in errors] != [len(row) for row in costs]:
        raise ValueError(f"errors and costs must have the same choices, got {[len(r) for r in errors]} and "
                         f"{[len(r) for r in costs]}")  # fmt: skip
    for name, table in (("errors", errors), ("costs", costs)):
        for unit, row in enumerate(table):
            if not len(row):
                raise ValueError(f"every unit must have a choice, got none for unit {unit}")
            if not np.isfinite(row).all():
                raise ValueError(f"{name} must be finite, got {list(row)} for unit {unit}")
