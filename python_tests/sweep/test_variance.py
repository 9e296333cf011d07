"""Shares of the variance of functions whose decomposition is known, and Shapley values by their definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mmq_kernels.sweep.variance import decompose, full_grid, shapley


def grid(*sizes: int) -> dict[str, np.ndarray]:
    cells = np.array(list(itertools.product(*(range(size) for size in sizes))))
    return {f"x{axis}": cells[:, axis] for axis in range(len(sizes))}


def test_shares_of_a_full_grid_are_exact_whatever_the_order_and_the_repeats() -> None:
    codes = grid(2, 3, 2)
    a, b, c = (codes[f"x{axis}"].astype(float) for axis in range(3))
    y = 3 * (a - 0.5) + 2 * (b - 1) + 4 * (a - 0.5) * (b - 1) + 5 * (a - 0.5) * (b - 1) * (c - 0.5)
    parts = {"x0": 9 / 4, "x1": 4 * 2 / 3, "x2": 0.0, "x0 x1": 16 / 4 * 2 / 3, "rest": 25 / 16 * 2 / 3}
    total = sum(parts.values())
    shuffled = np.random.default_rng(0).permutation(np.concatenate([np.arange(12), np.arange(5)]))
    for order in (np.arange(12), shuffled):
        found = decompose({name: level[order] for name, level in codes.items()}, y[order])
        assert found.full and found.rows == 12 and found.shared == 0
        for name in ("x0", "x1", "x2"):
            assert found.factors[name] == pytest.approx(parts[name] / total)
        assert found.pairs["x0", "x1"] == pytest.approx(parts["x0 x1"] / total)
        assert found.pairs["x0", "x2"] == pytest.approx(0, abs=1e-12)
        assert found.rest == pytest.approx(parts["rest"] / total)


def test_factors_varied_together_share_what_they_explain() -> None:
    draw = np.random.default_rng(1)
    low = draw.integers(0, 4, 600)
    codes = {"one": low, "same": low.copy(), "other": draw.integers(0, 3, 600), "idle": draw.integers(0, 3, 600)}
    y = 2.0 * low + codes["other"] * 1.0
    found = decompose(codes, y)
    assert not found.full
    assert found.factors["one"] == found.factors["same"] == pytest.approx(0, abs=1e-9)
    assert found.factors["other"] == pytest.approx((2 / 3) / (5 + 2 / 3), abs=0.03)
    assert found.shared == pytest.approx(5 / (5 + 2 / 3), abs=0.03)
    assert found.factors["idle"] == pytest.approx(0, abs=1e-6) and not found.pairs


def test_a_pair_is_found_where_no_grid_is_full_and_noise_is_no_pair() -> None:
    draw = np.random.default_rng(2)
    codes = {f"x{i}": draw.integers(0, 5, 900) for i in range(6)}
    noise = draw.normal(size=900)
    y = 3.0 * ((codes["x1"] > 2) ^ (codes["x4"] > 2)) + 0.5 * noise
    found = decompose(codes, y)
    assert not found.full
    assert next(iter(found.pairs)) == ("x1", "x4")
    assert found.pairs["x1", "x4"] > 0.7
    assert sum(share for pair, share in found.pairs.items() if pair != ("x1", "x4")) < 0.05
    silent = decompose(codes, noise)
    assert sum(silent.factors.values()) + sum(silent.pairs.values()) < 0.1 and silent.rest > 0.85


def test_many_levels_are_put_into_classes() -> None:
    draw = np.random.default_rng(3)
    level = draw.permutation(500)
    found = decompose({"fine": level, "two": draw.integers(0, 2, 500)}, level.astype(float))
    assert found.factors["fine"] > 0.95


def test_shapley_values_are_those_of_the_definition() -> None:
    """Average over all orders in which the factors may become known."""
    cells = np.random.default_rng(4).normal(size=(2, 3, 4))

    def worth(known: frozenset[int], at: tuple[int, ...]) -> float:
        chosen = tuple(slice(at[axis], at[axis] + 1) if axis in known else slice(None) for axis in range(3))
        return float(cells[chosen].mean())

    expected = np.zeros(3)
    for at in np.ndindex(cells.shape):
        for axis in range(3):
            gained = 0.0
            for order in itertools.permutations(range(3)):
                before = frozenset(order[: order.index(axis)])
                gained += worth(before | {axis}, at) - worth(before, at)
            expected[axis] += abs(gained / math.factorial(3)) / cells.size
    found = shapley(["a", "b", "c"], cells)
    assert found is not None
    assert list(found.values()) == pytest.approx(expected)
    assert shapley([f"x{i}" for i in range(7)], np.zeros((2,) * 7)) is None


def test_a_missing_cell_is_no_full_grid() -> None:
    codes = grid(2, 2)
    assert full_grid(codes, np.arange(4.0)) is not None
    holed = {name: np.append(level[:3], 0) for name, level in codes.items()}
    assert full_grid(holed, np.arange(4.0)) is None
