"""Seeded bootstrap intervals, plain and paired on the same samples.

Most metrics here are ``sum(numerator) / sum(denominator)`` over samples: accuracy and CIDEr (denominator 1),
NLL per token (denominator: tokens), recall (numerator: hit or not); BLEU and METEOR are other functions of sums over
samples. Samples that share an image are not independent, so the unit drawn is the cluster (the image), not the sample.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), percentile intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 2000
_CHUNK = 64
Values = npt.NDArray[np.float64]
Picks = npt.NDArray[np.int64]


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
        index = _cluster_of_each(self.clusters or self.keys)
        sums = np.zeros((2, int(index.max()) + 1))
        np.add.at(sums[0], index, self.numerator)
        np.add.at(sums[1], index, self.denominator)
        return sums[0], sums[1]

    def resampler(self) -> tuple[int, Callable[[Picks], Values]]:
        """How many clusters there are, and the metric on draws of them ``[draws, clusters]``."""
        numerator, denominator = self.by_cluster()
        return len(numerator), lambda picks: numerator[picks].sum(1) / denominator[picks].sum(1)


@dataclass(frozen=True)
class CorpusSamples:
    """One metric that is a function of sums of counts over samples.

    Attributes:
        keys: one id a sample; paired comparison insists on equal keys.
        counts: ``[samples][counts]``.
        metric: of sums ``[..., counts]``.
        clusters: what each sample belongs to (its image); empty where samples are independent.
    """

    keys: tuple[int | str, ...]
    counts: tuple[tuple[float, ...], ...]
    metric: Callable[[Values], Values]
    clusters: tuple[int | str, ...] = ()

    @property
    def value(self) -> float:
        """The metric over all samples."""
        return float(self.metric(np.sum(self.counts, 0)))

    def resampler(self) -> tuple[int, Callable[[Picks], Values]]:
        """As `MetricSamples.resampler`."""
        index = _cluster_of_each(self.clusters or self.keys)
        sums = np.zeros((int(index.max()) + 1, len(self.counts[0])))
        np.add.at(sums, index, np.asarray(self.counts, float))

        def drawn(picks: Picks) -> Values:
            rows, clusters = picks.shape
            places = (picks + clusters * np.arange(rows)[:, None]).ravel()
            times = np.bincount(places, minlength=rows * clusters).reshape(rows, clusters)
            return self.metric(times.astype(float) @ sums)

        return len(sums), drawn


Samples = MetricSamples | CorpusSamples


def _cluster_of_each(clusters: Sequence[int | str]) -> Picks:
    """A number for each cluster, in order of first appearance."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    return np.array([numbers[name] for name in clusters])


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


def interval(
    samples: Samples, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Interval:
    """The metric and its interval."""
    (drawn,) = _resampled([samples], seed, resamples)
    return Interval(samples.value, *_percentiles(drawn, confidence))


def paired_interval(
    samples: Samples,
    baseline: Samples,
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
    ours, theirs = _resampled([samples, baseline], seed, resamples)
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
    samples: Samples,
    baseline: Samples,
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
    ours, theirs = _resampled([samples, baseline], seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = ours / theirs
    return Interval(samples.value / baseline.value, *_percentiles(drawn, confidence))


def _resampled(metrics: Sequence[Samples], seed: int, resamples: int) -> list[Values]:
    """Each metric on `resamples` draws of clusters, the same for all."""
    counts, compute = zip(*(samples.resampler() for samples in metrics), strict=True)
    generator = np.random.default_rng(seed)
    drawn: list[list[Values]] = [[] for _ in metrics]
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        picks = generator.integers(0, counts[0], size=(rows, counts[0]))
        for values, metric in zip(drawn, compute, strict=True):
            values.append(metric(picks))
    return [np.concatenate(values) for values in drawn]


def _percentiles(drawn: Values, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)
