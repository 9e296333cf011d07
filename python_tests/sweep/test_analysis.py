"""What results say: importance on functions whose answer is known, fronts against brute force, the study's findings."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mmq_kernels.sweep import Result, analyze, fingerprint, keeping, pareto, read_published

TABLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "paper"
BITS = (2, 3, 4, 5, 6, 8, 16)
MEASURES = {"forest", "permutation", "shap", "shapley", "variance"}
REAL_FIND = importlib.util.find_spec


def grid(score: Callable[..., float], **changes: object) -> list[Result]:
    """A result for each of the bits of three parts."""
    results = []
    for vision, connector, language in itertools.product(BITS, repeat=3):
        factors = {"vision": vision, "connector": connector, "language": language}
        values = {
            "fingerprint": fingerprint(**factors),
            "model": "tiny",
            "task": "vqa",
            "method": "gptq",
            "factors": factors,
            "metrics": {"accuracy": score(**factors)},
            "bpw": (vision + connector + 2 * language) / 4,
        }
        results.append(Result(**(values | changes)))  # type: ignore[arg-type]
    return results


def test_shares_of_a_sum_are_those_of_its_terms() -> None:
    """Of a sum of independent parts the variance shares are exact; forest and permutation must come close."""
    found = analyze(grid(lambda vision, connector, language: 3 * (vision > 3) + 1 * (language > 3)), "accuracy")
    assert found.importance.keys() == MEASURES and not found.left_out
    for measure, shares in found.importance.items():
        # Contributions are measured by their size, variances by its square: 3 to 1 is 9 to 1.
        vision = 0.75 if measure in ("shap", "shapley") else 0.9
        assert shares["vision"] == pytest.approx(vision, abs=0.05), measure
        assert shares["language"] == pytest.approx(1 - vision, abs=0.05), measure
        assert shares["connector"] == pytest.approx(0, abs=0.02)
        assert sum(shares.values()) == pytest.approx(1)
    assert found.importance["variance"]["vision"] == pytest.approx(0.9)
    assert found.interactions == pytest.approx(0, abs=1e-9)
    assert found.full and found.decomposition["vision"] == pytest.approx(0.9)
    assert found.decomposition["vision x language"] == pytest.approx(0, abs=1e-9)
    assert found.importance["shapley"]["vision"] == pytest.approx(0.75)
    for part, share in found.consensus.items():
        used = [found.importance[measure][part] for measure in ("forest", "permutation", "shap")]
        assert share == pytest.approx(sum(used) / 3)
    assert found.unanimous and found.r2 > 0.97
    assert all(value == pytest.approx(1) for value in found.agreement.values())


def test_what_only_works_together_is_an_interaction() -> None:
    """With even halves, a product of signs has no effect of a factor alone."""
    sign = {bits: 1 if bits in (2, 4, 6) else -1 for bits in BITS if bits != 16}
    results = [
        result
        for result in grid(lambda vision, connector, language: sign.get(vision, 0) * sign.get(language, 0))
        if 16 not in result.factors.values()
    ]
    found = analyze(results, "accuracy")
    assert found.interactions == pytest.approx(1)
    assert found.decomposition["vision x language"] == pytest.approx(1)
    surface = found.surfaces[0]
    assert {surface.rows, surface.columns} == {"vision", "language"}
    assert surface.row_levels == surface.column_levels == [2, 3, 4, 5, 6, 8]
    assert surface.values[0][:3] == [1, -1, 1] and surface.values[1][:3] == [-1, 1, -1]
    assert found.importance["forest"]["connector"] < 0.2


def test_the_same_seed_gives_the_same_numbers() -> None:
    results = grid(lambda vision, connector, language: vision * language + connector)[::4]
    assert analyze(results, "accuracy") == analyze(list(results), "accuracy")


def test_curves_of_one_part_alone_and_what_keeps_the_score() -> None:
    def score(vision: int, connector: int, language: int) -> float:
        return min(vision, 4) / 4 * min(language, 6) / 6

    found = analyze(grid(score), "accuracy")
    assert found.alone["vision"] == [(bits, min(bits, 4) / 4) for bits in BITS]
    assert found.alone["connector"] == [(bits, 1.0) for bits in BITS]
    assert found.whole == 1.0 and found.cost == "bpw"
    expected = {"vision": 4, "connector": 2, "language": 6}
    assert found.keeps[0.99] is not None and found.keeps[0.99].factors == expected
    assert [point.value for point in found.front] == sorted({point.value for point in found.front})
    assert found.front[-1].factors == expected and found.front[-1].cost == 4.5


def test_without_shap_it_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "shap" else REAL_FIND(name))
    found = analyze(grid(lambda vision, connector, language: vision + 3 * language), "accuracy")
    assert found.importance.keys() == MEASURES - {"shap"}
    assert "package shap is not installed" in found.left_out["shap"]
    assert found.consensus["language"] == pytest.approx(
        sum(found.importance[measure]["language"] for measure in ("forest", "permutation", "shapley")) / 3
    )


def test_fronts_of_every_cost_and_a_metric_that_is_to_be_low() -> None:
    results = grid(
        lambda vision, connector, language: 2 / min(vision, 4) + 1 / min(language, 6), latency=0.5, bytes=None
    )
    low = [dataclasses.replace(each, metrics={"nll": each.metrics["accuracy"]}) for each in results]
    found = analyze(low, "nll")
    assert set(found.fronts) == {"bpw", "latency"} and found.cost == "bpw"
    assert len(found.fronts["latency"]) == 1 and found.fronts["latency"][0].value == min(
        each.metrics["nll"] for each in low
    )
    assert [point.value for point in found.front] == sorted((point.value for point in found.front), reverse=True)
    assert found.whole == pytest.approx(2 / 4 + 1 / 6)
    kept = found.keeps[0.9]
    assert kept is not None and kept.value <= found.whole / 0.9
    cheaper = [each for each in low if each.bpw is not None and each.bpw < kept.cost]
    assert all(each.metrics["nll"] > found.whole / 0.9 for each in cheaper)


def test_no_cost_no_front() -> None:
    found = analyze(grid(lambda **bits: bits["vision"], bpw=None), "accuracy")
    assert (found.cost, found.front, found.keeps) == (None, [], {})


def test_factors_that_never_vary_and_names_as_factors() -> None:
    results = [
        Result(
            fingerprint(i=i), "m", "t", "x", {"kind": kind, "bits": bits, "group": 64}, {"s": bits + (kind == "mlp")}
        )
        for i, (kind, bits) in enumerate(itertools.product(("mlp", "attention"), (2, 3, 4, 5, 6, 7)))
    ]
    found = analyze(results, "s")
    assert found.constant == {"group": 64}
    assert set(found.importance["variance"]) == {"kind", "bits"}


@pytest.mark.parametrize(
    ("change", "metric", "said"),
    [
        (lambda results: results[:9], "accuracy", "accuracy is in 9 results, at least 10 are needed"),
        (lambda results: results, "cider", r"cider is in 0 results, .*\(metrics: accuracy\)"),
        (lambda results: results + grid(lambda **_: 0.0, task="caption"), "accuracy", "of one task, got caption, vqa"),
        (lambda results: [r for r in results if r.factors["vision"] == 2], "accuracy", "accuracy is always the same"),
        (lambda results: results[:1] * 20, "accuracy", "no factor varies"),
        (
            lambda results: [*results, Result("f00", "tiny", "vqa", "gptq", {"vision": 2}, {"accuracy": 1.0})],
            "accuracy",
            "f00 has vision$",
        ),
    ],
)
def test_results_that_say_nothing_are_refused(change: Callable[..., list[Result]], metric: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        analyze(change(grid(lambda vision, **_: float(vision))), metric)


def test_fronts_are_those_of_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(draw.randint(0, 12))]
        costs, values = [cost for cost, _ in points], [value for _, value in points]
        beaten = {
            i
            for i, j in itertools.permutations(range(len(points)), 2)
            if costs[j] <= costs[i] and values[j] >= values[i] and points[i] != points[j]
        }
        front = pareto(costs, values)
        assert {points[i] for i in front} == {point for i, point in enumerate(points) if i not in beaten}
        assert len(front) == len({points[i] for i in front})
        best = keeping(costs, values, 0.5, 6)
        enough = [point for point in points if point[1] >= 3]
        assert (best is None) == (not enough)
        if best is not None:
            assert points[best] == min(enough, key=lambda point: (point[0], -point[1]))
    with pytest.raises(ValueError, match="as many, got 1 and 2"):
        pareto([1], [1, 2])


@pytest.mark.skipif(not TABLES.is_dir(), reason=f"no tables of the study in {TABLES}")
@pytest.mark.parametrize(
    ("method", "shares"), [("gptq", (0.50, 0.02, 0.48)), ("awq", (0.17, 0.03, 0.80))], ids=["gptq", "awq"]
)
def test_the_importance_that_the_study_found(method: str, shares: tuple[float, ...]) -> None:
    found = analyze(read_published(TABLES / f"{method}_captioning.csv"), "cider")
    forest = found.importance["forest"]
    for part, share in zip(("vision", "connector", "language"), shares, strict=True):
        assert forest[part] == pytest.approx(share, abs=0.05)
        assert found.consensus[part] == pytest.approx(share, abs=0.02)
    assert found.r2 > 0.9
    assert found.keeps[0.9] is not None and 3.5 < found.keeps[0.9].cost < 5
