"""Tests of differences: their p-values under no difference, Holm by hand, pairing, and what is left untested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic import fill

from mmq_kernels.eval.bootstrap import MetricSamples, paired_interval, paired_tests
from mmq_kernels.sweep import Result, Store, find
from mmq_kernels.sweep.differences import INTERVALS, PAIRED, UNTESTED, against, corrected, holm
from mmq_kernels.sweep.matched import RANKED, UNRECORDED, compare_methods
from mmq_kernels.sweep.predictions import Predictions


def series(values: np.ndarray) -> MetricSamples:
    return MetricSamples(tuple(range(len(values))), tuple(values.tolist()), (1.0,) * len(values))


def test_paired_tests_agree_with_paired_intervals_and_hold_their_level() -> None:
    draw = np.random.default_rng(0)
    chances = []
    for _ in range(200):
        luck = draw.normal(size=80)
        one, other = (series(luck + 0.3 * draw.normal(size=80)) for _ in range(2))
        ((interval, chance),) = paired_tests([one], other, seed=1, resamples=400)
        chances.append(chance)
    assert np.mean(np.array(chances) < 0.05) < 0.12
    better = series(np.array(other.numerator) + 0.2)
    ((interval, chance), (_, same)) = paired_tests([better, other], other, resamples=2000)
    exact = paired_interval(one, other, resamples=2000)
    ((drawn, _),) = paired_tests([one], other, resamples=2000)
    assert interval.value == pytest.approx(0.2) and chance < 0.002 and same == 1
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.02)
    with pytest.raises(ValueError, match="needs the same samples"):
        paired_tests([series(np.zeros(3))], other)


def test_samples_of_one_image_are_drawn_together() -> None:
    """Four copies of every sample are not four times the evidence."""
    draw = np.random.default_rng(1)
    gap = draw.normal(0.1, 1, 40)

    def both(times: int) -> float:
        names = tuple(np.repeat(np.arange(40), times).tolist())
        keys = tuple(range(40 * times))
        one = MetricSamples(keys, tuple(np.repeat(gap, times).tolist()), (1.0,) * len(keys), names)
        other = MetricSamples(keys, (0.0,) * len(keys), (1.0,) * len(keys), names)
        ((_, chance),) = paired_tests([one], other, seed=3)
        return chance

    assert both(4) == pytest.approx(both(1), abs=1e-12)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def result(name: str, value: float, interval: tuple[float, float] | None = None, **changes: object) -> Result:
    values = {
        "fingerprint": name, "model": "m", "task": "vqa", "method": "gptq", "factors": {"vision": 4},
        "metrics": {"accuracy": value}, "intervals": {"accuracy": interval} if interval else {},
    }  # fmt: skip
    return Result(**(values | changes))  # type: ignore[arg-type]


def test_intervals_are_used_where_there_are_no_predictions_and_nothing_else_is() -> None:
    base = result("base", 0.8, (0.75, 0.85))
    far, near, bare = result("far", 0.6, (0.55, 0.65)), result("near", 0.79, (0.74, 0.84)), result("bare", 0.1)
    found = {each.one: each for each in against([far, near, bare], base, "accuracy", Predictions())}
    assert found["far"].how == found["near"].how == INTERVALS
    assert found["far"].real is True and found["near"].real is False
    error = 2**0.5 * 0.05  # in half widths of 95%
    assert (found["far"].low, found["far"].high) == pytest.approx((-0.2 - error, -0.2 + error))
    assert found["bare"].how == UNTESTED and found["bare"].p is None and found["bare"].real is None
    assert found["bare"].value == pytest.approx(-0.7)
    assert corrected([]) == []


def test_predictions_are_paired_and_damaged_ones_named(tmp_path: Path) -> None:
    database = fill(tmp_path, methods=("gptq", "awq"), tasks=("vqa",), samples=80)
    with Store(database) as store:
        results = store.results()
        found = find(results, predictions=store.predictions)
        assert {each.how for one in found.analyses for each in one.differences} == {PAIRED}
        (compared,) = found.comparisons
        assert (compared.one, compared.other, compared.better) == ("awq", "gptq", "gptq")
        assert compared.how.startswith(PAIRED) and compared.real is True
        assert compared.unlike == [] and len(compared.settings) == 26
        assert compared.losses >= 15 and compared.wins == 0
        low = next(each for each in results if each.factors == {"vision": 3, "connector": 16, "language": 16})
        path = store.predictions(low.fingerprint)
        path.write_text(path.read_text()[:-30])
        again = find(results, predictions=store.predictions)
        assert any(f"{path}, line 80 is no JSON object" in reason for reason in again.left_out)
        untested = [each for one in again.analyses for each in one.differences if each.one == low.fingerprint]
        assert [each.how for each in untested] == [UNTESTED]


def test_predictions_of_other_samples_are_not_paired(tmp_path: Path) -> None:
    records = [{"id": i, "image": f"{i}.png", "accuracy": 1.0} for i in range(5)]
    for name, kept in (("one", records), ("two", records[:4])):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in kept))
    reader = Predictions(lambda name: tmp_path / name)
    (found,) = against([result("two", 0.5)], result("one", 0.6), "accuracy", reader)
    assert found.how == UNTESTED and reader.problems == []
    small = Predictions(lambda name: tmp_path / name, most_bytes=10)
    assert small.samples("one", "accuracy") is None and "were not read" in small.problems[0]


def methods(recipes: tuple[str, str], count: int = 8) -> list[Result]:
    results = []
    for bits in range(2, 2 + count):
        for method, recipe in zip(("awq", "gptq"), recipes, strict=True):
            results.append(
                result(
                    f"{method}{bits}", bits / 10 + (method == "awq") * 0.01 * bits, method=method,
                    factors={"vision": bits}, recipe=recipe.format(bits=bits),
                )
            )  # fmt: skip
    return results


def test_methods_are_matched_by_their_recipes_or_the_difference_is_said() -> None:
    alike = ("vision=awq:4:g64:asym", "vision=gptq:4:g64:asym")
    (found,) = compare_methods(methods(alike), "accuracy", Predictions())
    assert found.unlike == [] and found.how.startswith(RANKED) and found.better == "awq"
    assert found.mean == pytest.approx(0.01 * np.mean(range(2, 10))) and found.wins == 8 and found.real is True
    assert found.p == pytest.approx(2 / 2**8)
    unlike = ("vision=awq:4:g128:asym", "vision=gptq:4:channel:sym")
    (found,) = compare_methods(methods(unlike), "accuracy", Predictions())
    assert found.unlike == ["g128 asym / channel sym"] and len(found.settings) == 8
    (found,) = compare_methods(methods(("", "")), "accuracy", Predictions())
    assert found.unlike == [UNRECORDED]
    (found,) = compare_methods(methods(alike, count=4), "accuracy", Predictions())
    assert found.how == UNTESTED and found.real is None
    assert compare_methods(methods(alike)[::2], "accuracy", Predictions()) == []
