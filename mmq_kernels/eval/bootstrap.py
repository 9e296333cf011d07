"""Seeded bootstrap intervals of ratios of sums, plain and paired on the same samples.

Every metric here is ``sum(numerator) / sum(denominator)`` over samples: accuracy and CIDEr (denominator 1),
NLL per token (denominator: tokens), recall (numerator: hit or not). Samples that share an image are not
independent, so the unit drawn is the cluster (the image), not the sample.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), percentile intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 2000
_CHUNK = 64
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MetricSamples:
    """One metric, sample by sample.

    Attributes:
        keys: one id a sample; paired comparison insists on equal keys.
        numerator, denominator: one value a sample.
        clusters: what each sample belongs to (its image); empty where samples are independent.
    """

    keys: tuple[int | str, ...]
    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    clusters: tuple[int | str, ...] = ()

    @property
    def value(self) -> float:
        """The metric over all samples."""
        return float(np.sum(self.numerator) / np.sum(self.denominator))

    def by_cluster(self) -> tuple[Values, Values]:
        """Numerators and denominators summed over each cluster, in order of first appearance."""
        numbers = {name: i for i, name in enumerate(dict.fromkeys(self.clusters or self.keys))}
        index = np.array([numbers[name] for name in self.clusters or self.keys])
        sums = np.zeros((2, len(numbers)))
        np.add.at(sums[0], index, self.numerator)
        np.add.at(sums[1], index, self.denominator)
        return sums[0], sums[1]


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


def interval(
    samples: MetricSamples, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Interval:
    """The metric and its interval."""
    numerator, denominator = samples.by_cluster()
    (drawn,) = _resampled([(numerator, denominator)], seed, resamples)
    return Interval(samples.value, *_percentiles(drawn, confidence))


def paired_interval(
    samples: MetricSamples,
    baseline: MetricSamples,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """``metric(samples) - metric(baseline)`` and its interval, both resampled alike.

    Raises:
        ValueError: the two were not measured on the same samples.
    """
    if samples.keys != baseline.keys or samples.clusters != baseline.clusters:
        odd = len(set(samples.keys) ^ set(baseline.keys))
        raise ValueError(f"a paired comparison needs the same samples in the same order; {odd} are in one run only")
    ours, theirs = _resampled([samples.by_cluster(), baseline.by_cluster()], seed, resamples)
    return Interval(samples.value - baseline.value, *_percentiles(ours - theirs, confidence))


def paired_tests(
    series: Sequence[MetricSamples],
    baseline: MetricSamples,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> list[tuple[Interval, float]]:
    """Each of `series` minus the baseline with its interval, and how likely such a difference is without a cause.

    One draw of clusters serves them all. The probability is two-sided: twice the share of draws in which the difference
    has the other sign or is 0, at most 1 and never below ``2 / (resamples + 1)``.

    Raises:
        ValueError: one was not measured on the samples of the baseline.
    """
    for samples in series:
        if samples.keys != baseline.keys or samples.clusters != baseline.clusters:
            raise ValueError("a paired comparison needs the same samples in the same order")
    sums = [samples.by_cluster() for samples in (baseline, *series)]
    numerators, denominators = np.stack([top for top, _ in sums], 1), np.stack([below for _, below in sums], 1)
    count = len(numerators)
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        picks = generator.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(picks.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        drawn.append((times @ numerators) / (times @ denominators))
    values = np.concatenate(drawn)
    differences = values[:, 1:] - values[:, :1]
    found = []
    for samples, column in zip(series, differences.T, strict=True):
        opposed = min(int((column <= 0).sum()), int((column >= 0).sum()))
        chance = min(1.0, 2 * (opposed + 1) / (resamples + 1))
        found.append((Interval(samples.value - baseline.value, *_percentiles(column, confidence)), chance))
    return found


def ratio_interval(
    samples: MetricSamples,
    baseline: MetricSamples,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """``metric(samples) / metric(baseline)`` and its interval: what share of the baseline is kept.

    Raises:
        ValueError: the two were not measured on the same samples, or the baseline is 0.
    """
    if samples.keys != baseline.keys or samples.clusters != baseline.clusters:
        raise ValueError("a paired comparison needs the same samples in the same order")
    if baseline.value == 0:
        raise ValueError("a share of the baseline needs a baseline other than 0")
    ours, theirs = _resampled([samples.by_cluster(), baseline.by_cluster()], seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = ours / theirs
    return Interval(samples.value / baseline.value, *_percentiles(drawn, confidence))


def _resampled(pairs: Sequence[tuple[Values, Values]], seed: int, resamples: int) -> list[Values]:
    """For each (numerator, denominator) the metric on `resamples` draws of clusters, the same for all."""
    count = len(pairs[0][0])
    generator = np.random.default_rng(seed)
    drawn: list[list[Values]] = [[] for _ in pairs]
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        picks = generator.integers(0, count, size=(rows, count))
        for values, (numerator, denominator) in zip(drawn, pairs, strict=True):
            values.append(numerator[picks].sum(1) / denominator[picks].sum(1))
    return [np.concatenate(values) for values in drawn]


def _percentiles(drawn: Values, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)
