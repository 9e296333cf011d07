"""The search on models whose loss is known: it has to find what is best, whatever it is told at first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmq_kernels.sweep.allocation.search import Candidate, Measured, Search, error_models, run
from mmq_kernels.sweep.allocation.sensitivity import Sensitivity

BITS = (2, 3, 4, 8)
NAMES = [f"{bits}bit" for bits in BITS]
UNITS = 6
COMPONENTS = ["vision"] * 2 + ["connector"] + ["language"] * 3
FLOAT_LOSS = 0.5


def sensitivities(seed: int = 0, wrong: float = 0.0) -> tuple[list[list[Sensitivity | None]], np.ndarray]:
    """Measured on single units, and what each really adds to the squared error; they differ by a factor a unit."""
    rng = np.random.default_rng(seed)
    share = 10 ** rng.uniform(-2, 0, UNITS)
    output = 10 ** rng.uniform(-1, 0, UNITS)
    real = share[:, None] * 4.0 ** -np.array(BITS)
    measured = real * np.exp(rng.normal(0, wrong, UNITS))[:, None]
    table: list[list[Sensitivity | None]] = [
        [
            Sensitivity(output[u] * 4.0**-bits, bits * 1000, float(measured[u, i]) if bits < 4 else None)
            for i, bits in enumerate(BITS)
        ]
        for u in range(UNITS)
    ]
    return table, real


def searched(table: list[list[Sensitivity | None]], real: np.ndarray, limit: float, count: int = 30) -> Search:
    costs = [[float(bits) for bits in BITS] for _ in range(UNITS)]
    search = Search(error_models(table), costs, limit, [[u] for u in range(UNITS)], FLOAT_LOSS)

    def score(candidate: Candidate, predicted: float | None) -> Measured:
        summed = sum(real[u, i] for u, i in enumerate(candidate.chosen))
        cost = search.cost(candidate.chosen)
        return Measured(candidate, predicted, FLOAT_LOSS + 3 * summed**1.5, cost, cost <= limit)

    run(search, score, names=NAMES, components=COMPONENTS, count=count)
    return search


def least(real: np.ndarray, limit: float) -> float:
    fitting = [c for c in itertools.product(range(len(BITS)), repeat=UNITS) if sum(BITS[i] for i in c) <= limit]
    return FLOAT_LOSS + 3 * min(sum(real[u, i] for u, i in enumerate(c)) for c in fitting) ** 1.5


@pytest.mark.parametrize("seed", range(4))
def test_right_sensitivities_give_the_optimum(seed: int) -> None:
    table, real = sensitivities(seed)
    search = searched(table, real, 19)
    assert min(one.loss for one in search.measured) == pytest.approx(least(real, 19))


@pytest.mark.parametrize("seed", range(4))
def test_wrong_ones_are_put_right_by_what_whole_models_lose(seed: int) -> None:
    table, real = sensitivities(seed, wrong=1.0)
    search = searched(table, real, 19)
    first = next(one for one in search.measured if one.candidate.why.startswith("error model"))
    found = min(one.loss for one in search.measured)
    assert found <= first.loss
    assert found - FLOAT_LOSS <= 1.15 * (least(real, 19) - FLOAT_LOSS)
    told = [(one.loss - FLOAT_LOSS, one.predicted - FLOAT_LOSS) for one in search.measured if one.predicted is not None]
    assert np.corrcoef(np.log(np.maximum(told, 1e-12)).T)[0, 1] > 0.5


def test_every_uniform_allocation_within_the_budget_is_measured_and_no_other() -> None:
    table, real = sensitivities()
    search = searched(table, real, 4 * UNITS, count=5)
    uniform = [one.candidate.why for one in search.measured if one.candidate.uniform]
    assert uniform[:3] == ["uniform 2bit", "uniform 3bit", "uniform 4bit"]
    assert all(one.cost <= 4 * UNITS for one in search.measured)
    assert len({one.chosen for one in search.measured}) == len(search.measured) == 3 + 5


def test_components_keep_one_width_where_asked() -> None:
    table, real = sensitivities()
    costs = [[float(bits) for bits in BITS] for _ in range(UNITS)]
    groups = [[0, 1], [2], [3, 4, 5]]
    search = Search(error_models(table), costs, 19, groups, FLOAT_LOSS)

    def score(candidate: Candidate, predicted: float | None) -> Measured:
        summed = sum(real[u, i] for u, i in enumerate(candidate.chosen))
        return Measured(candidate, predicted, FLOAT_LOSS + summed, search.cost(candidate.chosen), True)

    run(search, score, names=NAMES, components=COMPONENTS, count=12)
    assert len(search.measured) > 6
    for one in search.measured:
        assert all(len({one.chosen[unit] for unit in group}) == 1 for group in groups)


def test_all_that_there_is_may_be_less_than_asked_for() -> None:
    table, real = sensitivities()
    search = searched(table, real, 2 * UNITS + 1, count=50)
    assert {one.chosen for one in search.measured} == {
        (0,) * UNITS,
        *(tuple(int(u == unit) for u in range(UNITS)) for unit in range(UNITS)),
    }


def test_error_models_infer_what_was_not_measured() -> None:
    row: list[Sensitivity | None] = [
        Sensitivity(0.1, 1, 0.02),
        Sensitivity(0.01, 1, 0.004),
        Sensitivity(0.001, 1),
        None,
    ]
    other: list[Sensitivity | None] = [Sensitivity(0.2, 1), Sensitivity(0.02, 1), Sensitivity(0.002, 1), None]
    models = error_models([row, other])
    assert models["model"][0] == pytest.approx([0.02, 0.004, 0.0004, 0])
    factor = 0.024 / 0.11
    assert models["block"][0] == pytest.approx([0.1 * factor, 0.01 * factor, 0.001 * factor, 0])
    assert models["even"][1] == pytest.approx([0.2 * factor, 0.02 * factor, 0.002 * factor, 0])
