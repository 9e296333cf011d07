"""When a choice is told apart from a uniform allocation, and how that is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmq_kernels.eval import Interval
from mmq_kernels.sweep.allocation.finals import Final, told, within_noise
from mmq_kernels.sweep.allocation.search import Candidate, Measured


def final(nll: list[float], right: list[float]) -> Final:
    rows: list[dict[str, Any]] = [
        {"id": i, "image": i, "accuracy": ok, "nll": loss, "nll_tokens": 1}
        for i, (loss, ok) in enumerate(zip(nll, right, strict=True))
    ]
    return Final(Measured(Candidate((0,), "here"), None, sum(nll) / len(nll), 3.0, True), records=rows)


def test_a_lead_in_every_sample_is_sure_and_one_that_comes_and_goes_is_noise() -> None:
    uniform = final([0.5] * 40, [0.0, 1.0] * 20)
    lead = final([0.4] * 40, [0.0, 1.0] * 20).against(uniform, ("nll", "accuracy"))
    assert set(lead) == {"nll", "accuracy"} and not within_noise(lead)
    lead = final([0.4, 0.58] * 20, [1.0, 0.0] * 20).against(uniform, ("nll", "accuracy"))
    assert lead["nll"].low < 0 < lead["nll"].high and lead["accuracy"].value == 0 and within_noise(lead)
    assert told(lead).startswith("nll -0.0100 (-0.") and "accuracy +0.0000 (" in told(lead)


def test_less_nll_and_more_of_other_metrics_are_better() -> None:
    above, below = Interval(1.0, 0.5, 1.5), Interval(-1.0, -1.5, -0.5)
    assert within_noise({"nll": above}) and not within_noise({"nll": below})
    assert within_noise({"cider": below}) and not within_noise({"cider": above})
    assert not within_noise({})


def test_metrics_that_one_lacks_are_not_compared() -> None:
    one = final([0.5], [1.0])
    other = replace(one, records=[{key: value for key, value in one.records[0].items() if key != "accuracy"}])
    assert set(one.against(other, ("nll", "accuracy", "cider"))) == {"nll"}
