"""Budgets as people write them."""

import pytest

from mmq_kernels.sweep.allocation.budget import Budget, BudgetError


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4.0bpw", "bpw", 4.0),
        ("3bpw", "bpw", 3.0),
        (".5 BPW", "bpw", 0.5),
        ("2GB", "bytes", 2e9),
        ("1.5 GiB", "bytes", 1.5 * 2**30),
        ("700MB", "bytes", 7e8),
        ("64kib", "bytes", 2**16),
        ("30ms", "ms", 30.0),
        ("0.25ms", "ms", 0.25),
    ],
)
def test_what_is_a_budget(text: str, kind: str, value: float) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))


@pytest.mark.parametrize(
    "text",
    ["4bit", "-1bpw", "30", "", "bpw", "0bpw", "0.0GB", "nanms", "infGB", "1e3bpw", "4.0bpw!", "2 G B", "1.2.3ms"],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(
        BudgetError, match=r"must be a number above 0 with its unit .* 4\.0bpw, 2GB .* 30ms, got"
    ) as error:
        Budget.parse(text)
    assert repr(text) in str(error.value)


def test_costs_are_told_in_its_unit() -> None:
    assert Budget.parse("2GB").shown(1.5e9) == "1.5GB"
    assert Budget.parse("3.5bpw").shown(3.12345) == "3.123bpw"
    assert str(Budget.parse("2.50GiB")) == "2.5GiB"
