"""Whether two settings differ: paired on the same samples where their predictions were kept, else by their intervals.

What is tested together is corrected for being many: Holm's step-down procedure (1979), which bounds the chance that any
of the differences called real is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmq_kernels.eval.bootstrap import Interval, MetricSamples, paired_tests
from mmq_kernels.sweep.predictions import Predictions
from mmq_kernels.sweep.store import Result

SIGNIFICANT = 0.05
PAIRED = "paired bootstrap over the samples"
INTERVALS = "their intervals, as if of different samples"
UNTESTED = "not tested"
_Z = 1.959963984540054
"""Half a 95% interval in standard errors."""
RESAMPLES = 4000


@dataclass(frozen=True)
class Difference:
    """One setting against another.

    Attributes:
        one, other: fingerprints.
        value: metric of `one` minus metric of `other`.
        low, high: ends of its 95% interval, of this comparison alone; None where it is not tested.
        p: how likely so large a difference is without a cause, two-sided; None where it is not tested.
        adjusted: `p` corrected for all that was tested together.
        how: by what it is tested.
    """

    one: str
    other: str
    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None
    how: str = UNTESTED

    @property
    def real(self) -> bool | None:
        """Whether the two differ at the 5% level, corrected; None where that is not tested."""
        return None if self.adjusted is None else self.adjusted < SIGNIFICANT


def holm(chances: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of `chances`."""
    adjusted = [0.0] * len(chances)
    reached = 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        reached = max(reached, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = reached
    return adjusted


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """The same with `adjusted`, of all that are tested."""
    adjusted = iter(holm([each.p for each in found if each.p is not None]))
    return [each if each.p is None else replace(each, adjusted=next(adjusted)) for each in found]


def against(
    results: Sequence[Result], baseline: Result, metric: str, predictions: Predictions, *, seed: int = 0
) -> list[Difference]:
    """Each of the results minus the baseline, corrected for their number.

    Args:
        results: of the same model and task as the baseline, all holding the metric.
        predictions: where per-sample predictions are read from.
        seed: of the bootstrap.
    """
    base = predictions.samples(baseline.fingerprint, metric)
    series = {result.fingerprint: predictions.samples(result.fingerprint, metric) for result in results}
    paired = [name for name, samples in series.items() if base is not None and alike(samples, base)]
    tested: dict[str, tuple[Interval, float]] = {}
    if base is not None and paired:
        chosen = [samples for name in paired if (samples := series[name]) is not None]
        tested = dict(zip(paired, paired_tests(chosen, base, seed=seed, resamples=RESAMPLES), strict=True))
    return corrected([_difference(result, baseline, metric, tested.get(result.fingerprint)) for result in results])


def alike(samples: MetricSamples | None, other: MetricSamples | None) -> bool:
    """Whether two series are of the same samples in the same order."""
    if samples is None or other is None:
        return False
    return samples.keys == other.keys and samples.clusters == other.clusters


def _difference(one: Result, other: Result, metric: str, paired: tuple[Interval, float] | None) -> Difference:
    value = one.metrics[metric] - other.metrics[metric]
    found = Difference(one.fingerprint, other.fingerprint, value)
    if paired is not None:
        interval, chance = paired
        return replace(found, low=interval.low, high=interval.high, p=chance, how=PAIRED)
    ends = one.intervals.get(metric), other.intervals.get(metric)
    if ends[0] is None or ends[1] is None:
        return found
    error = math.hypot(*((high - low) / (2 * _Z) for low, high in (ends[0], ends[1])))
    chance = math.erfc(abs(value) / error / math.sqrt(2)) if error > 0 else float(value == 0)
    return replace(found, low=value - _Z * error, high=value + _Z * error, p=chance, how=INTERVALS)
