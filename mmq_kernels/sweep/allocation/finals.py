"""The last round: of the models with the least loss, and of the uniform ones, the task's own metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmq_kernels.eval import EvalResult, Interval, metric_samples, paired_interval
from mmq_kernels.sweep.allocation.measurements import Measurements
from mmq_kernels.sweep.allocation.scoring import METRICS, Scorer
from mmq_kernels.sweep.allocation.search import Candidate, Measured

FINALISTS = 3
"""Mixed models, and uniform ones, that get so far."""

_KEPT = ("id", "image", "kind", "accuracy", "cider", "nll", "nll_tokens")


@dataclass(frozen=True)
class Final:
    """A model with its metrics.

    Attributes:
        metrics: of the task; empty where evaluation cannot do it.
        intervals: 95%, ends by metric.
        records: one a sample, without texts.
    """

    measured: Measured
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"metrics": dict(self.metrics), "intervals": dict(self.intervals)} if self.metrics else {}

    def against(self, other: Final, names: Sequence[str]) -> dict[str, Interval]:
        """What these metrics are above the other's, paired 95% intervals; of those that both have."""
        ours, theirs = (metric_samples([dict(row) for row in final.records]) for final in (self, other))
        return {name: paired_interval(ours[name], theirs[name]) for name in names if name in ours and name in theirs}

    def below(self, other: Final, task: str) -> bool:
        """Whether one of the metrics that decide is below the other's: paired 95% interval without zero."""
        return any(ends.high < 0 for ends in self.against(other, METRICS[task]).values())


def finals(
    inside: Sequence[Measured],
    scorer: Scorer,
    quantized: Callable[[Candidate], Any],
    kept: Measurements,
    selection: Any,
    task: str,
) -> list[Final]:
    """The finalists, least loss first, with their metrics where evaluation can do the task.

    Args:
        inside: models within the budget.
        quantized: makes one again.
    """
    ranked = sorted(inside, key=lambda one: one.loss)
    chosen = [
        one
        for uniform in (False, True)
        for one in [each for each in ranked if each.candidate.uniform == uniform][:FINALISTS]
    ]
    found = []
    for one in sorted(chosen, key=lambda each: each.loss):
        if scorer.why_not:
            found.append(Final(one))
            continue

        def measure(one: Measured = one) -> dict[str, Any]:
            return _kept(scorer.evaluate(quantized(one.candidate)), task)

        value = kept.once(measure, measured="metrics", chosen=one.facts["key"], selection=selection)
        found.append(Final(one, value["metrics"], value["intervals"], value["records"]))
    return found


def winner(ranked: Sequence[Final], task: str) -> Final:
    """The one with the least loss of those whose metrics are not below any uniform one's."""
    uniform = [one for one in ranked if one.measured.candidate.uniform]
    fit = [one for one in ranked if not any(one.below(other, task) for other in uniform if other is not one)]
    return (fit or list(ranked))[0]


def within_noise(lead: Mapping[str, Interval]) -> bool:
    """Whether there is a comparison, and no metric of it is better for sure; NLL is better where it is less."""
    sure = (ends.high < 0 if name == "nll" else ends.low > 0 for name, ends in lead.items())
    return bool(lead) and not any(sure)


def told(lead: Mapping[str, Interval]) -> str:
    return ", ".join(f"{name} {ends.value:+.4f} ({ends.low:+.4f} to {ends.high:+.4f})" for name, ends in lead.items())


def _kept(result: EvalResult, task: str) -> dict[str, Any]:
    names = {*_KEPT, *(name for row in result.records for name in row if "rank" in name)}
    return {
        "metrics": {name: value for name, value in result.metrics.items() if value is not None},
        "intervals": {name: asdict(ends) for name, ends in result.intervals.items()},
        "records": [{name: value for name, value in row.items() if name in names} for row in result.records],
    }
