"""The solver against all there is: every allocation of small instances, looked at one by one."""

import itertools
import math
import random
from itertools import islice

import pytest

from mmq_kernels.sweep.allocation import solver
from mmq_kernels.sweep.allocation.solver import SolverError, best, solve, total

Table = list[list[float]]


def instance(seed: int) -> tuple[Table, Table, float]:
    """Errors that fall steeply with cost, as those of bit widths do, over many orders of magnitude; and a limit."""
    rng = random.Random(seed)
    units, choices = rng.randint(1, 5), rng.randint(1, 5)
    errors, costs = [], []
    for _ in range(units):
        size, steepness = rng.choice([1, 3, 17, 1000.5]), rng.uniform(1, 12)
        scale = 10 ** rng.uniform(-9, 2)
        costs.append([size * (width + 2 + (rng.random() if seed % 2 else 0)) for width in range(choices)])
        errors.append([scale * steepness**-width * rng.uniform(0.5, 1.5) for width in range(choices)])
    low, high = sum(map(min, costs)), sum(map(max, costs))
    return errors, costs, low + (high - low) * rng.uniform(-0.05, 1.05)


def every(errors: Table, costs: Table, limit: float) -> list[tuple[float, tuple[int, ...]]]:
    """All allocations within the limit, least error first."""
    found = []
    for chosen in itertools.product(*(range(len(row)) for row in errors)):
        cost = sum(row[i] for row, i in zip(costs, chosen, strict=True))
        if cost <= limit:
            found.append((sum(row[i] for row, i in zip(errors, chosen, strict=True)), chosen))
    return sorted(found)


@pytest.mark.parametrize("seed", range(60))
def test_optimum_is_that_of_exhaustive_search(seed: int) -> None:
    errors, costs, limit = instance(seed)
    wanted = every(errors, costs, limit)
    found = solve(errors, costs, limit)
    if not wanted:
        assert found is None
        return
    assert found is not None
    assert total(costs, found) <= limit * (1 + 1e-9)
    assert total(errors, found) == pytest.approx(wanted[0][0], rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_next_best_come_in_their_order(seed: int) -> None:
    errors, costs, limit = instance(100 + seed)
    wanted = every(errors, costs, limit)
    found = list(islice(best(errors, costs, limit), 12))
    assert len(found) == len(set(found)) == min(12, len(wanted))
    for chosen, (error, _) in zip(found, wanted, strict=False):
        assert total(errors, chosen) == pytest.approx(error, rel=1e-12)


def test_proposals_keep_their_distance() -> None:
    errors, costs = [[4.0, 2.0, 1.0]] * 4, [[1.0, 2.0, 3.0]] * 4
    found = list(islice(best(errors, costs, 9, apart=2), 5))
    for one, other in itertools.combinations(found, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2


def test_a_limit_met_to_the_bit() -> None:
    costs = [[0.1, 0.2], [0.3, 0.7], [0.1, 0.4]]
    errors = [[1.0, 0.0]] * 3
    assert solve(errors, costs, 0.2 + 0.7 + 0.4) == (1, 1, 1)
    assert solve(errors, costs, 0.1 + 0.3 + 0.1) == (0, 0, 0)
    assert solve(errors, costs, 0.1 + 0.3 + 0.1 - 1e-6) is None
    assert solve([[1.0]], [[0.0]], 0.0) == (0,)
    bits = [[196_608.0 * b for b in (2, 3)]] * 40
    assert solve([[1.0, 0.5]] * 40, bits, 196_608.0 * 81 - 1) == (0,) * 40


def test_units_may_have_different_choices_and_one_may_have_a_single_one() -> None:
    assert solve([[1.0], [5.0, 1.0, 0.5]], [[10.0], [1.0, 2.0, 9.0]], 13) == (0, 1)
    assert solve([[3.0, 1.0]], [[2.0, 2.0]], 2.0) == (1,)
    assert solve([], [], 1.0) == ()


@pytest.mark.parametrize(
    ("errors", "costs", "message"),
    [
        ([[1.0]], [[1.0, 2.0]], "same choices"),
        ([[]], [[]], "must have a choice, got none for unit 0"),
        ([[math.nan, 1.0]], [[1.0, 2.0]], "errors must be finite"),
        ([[1.0]], [[math.inf]], "costs must be finite, got .*inf.* for unit 0"),
    ],
)
def test_tables_that_are_none(errors: Table, costs: Table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(errors, costs, 1.0)


def test_costs_with_too_many_different_sums_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "MOST_SUMS", 100)
    rng = random.Random(0)
    costs = [[rng.uniform(1, 2) for _ in range(8)] for _ in range(12)]
    errors = [[3 - cost for cost in row] for row in costs]
    with pytest.raises(SolverError, match=r"too many different sums \(\d+ from unit \d+ on\); round them"):
        solve(errors, costs, 18.0)


def test_a_large_model_is_solved_exactly() -> None:
    """112 blocks of three shapes and 8 widths: against dynamic programming over costs, which are whole numbers here."""
    rng = random.Random(1)
    shapes = [3, 5, 8]
    sizes = [rng.choice(shapes) for _ in range(112)]
    costs = [[float(size * b) for b in (2, 3, 4, 5, 6, 7, 8, 16)] for size in sizes]
    errors = [[rng.uniform(0.5, 2) * 4.0**-b * 10 ** rng.uniform(-2, 2) for b in range(8)] for _ in sizes]
    limit = int(3.6 * sum(sizes))
    table = [0.0] + [math.inf] * limit
    for cost, error in zip(costs, errors, strict=True):
        table = [
            min((table[left - int(c)] + e for c, e in zip(cost, error, strict=True) if left >= c), default=math.inf)
            for left in range(limit + 1)
        ]
    found = solve(errors, costs, limit)
    assert found is not None
    assert total(errors, found) == pytest.approx(min(table), rel=1e-12)
