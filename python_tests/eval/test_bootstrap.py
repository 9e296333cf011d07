"""Bootstrap intervals: coverage, pairing, clusters."""

import numpy as np
import pytest

from mmq_kernels.eval import CorpusSamples, MetricSamples, interval, paired_interval, ratio_interval


def _samples(values: np.ndarray, weights: np.ndarray | None = None, clusters: tuple = ()) -> MetricSamples:
    weights = np.ones(len(values)) if weights is None else weights
    return MetricSamples(tuple(range(len(values))), tuple(values), tuple(weights), clusters)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    trials = 300
    hits = sum(
        found.low <= 0.7 <= found.high
        for found in (
            interval(_samples((generator.random(200) < 0.7).astype(float)), resamples=400) for _ in range(trials)
        )
    )
    assert 0.90 <= hits / trials <= 0.985


def test_interval_is_seeded() -> None:
    samples = _samples(np.random.default_rng(0).random(50))
    assert interval(samples, seed=1) == interval(samples, seed=1) != interval(samples, seed=2)


def test_value_is_a_ratio_of_sums() -> None:
    samples = _samples(np.array([1.0, 8.0]), np.array([1.0, 3.0]))
    assert samples.value == interval(samples).value == 9 / 4


def test_pairing_removes_what_the_samples_share() -> None:
    generator = np.random.default_rng(1)
    hard = generator.random(400)
    baseline, ours = _samples(hard), _samples(hard - 0.01 + 0.001 * generator.standard_normal(400))
    paired = paired_interval(ours, baseline)
    assert paired.value == pytest.approx(-0.01, abs=5e-4)
    assert paired.high < 0 and paired.high - paired.low < 0.001
    assert interval(ours).high - interval(ours).low > 0.03
    kept = ratio_interval(ours, baseline)
    assert kept.value == pytest.approx(0.98, abs=0.005) and kept.low < kept.value < kept.high < 1


def test_equal_runs_differ_by_exactly_zero() -> None:
    samples = _samples(np.random.default_rng(0).random(30))
    assert paired_interval(samples, samples) == paired_interval(samples, samples, seed=5)
    assert (paired_interval(samples, samples).low, paired_interval(samples, samples).high) == (0.0, 0.0)


def test_samples_of_one_image_are_drawn_together() -> None:
    """Ten copies of each value carry no more information than one."""
    values = np.random.default_rng(2).random(40)
    copies = np.repeat(values, 10)
    alone = interval(_samples(values))
    together = interval(_samples(copies, clusters=tuple(i // 10 for i in range(400))))
    naive = interval(_samples(copies))
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert naive.high - naive.low < 0.5 * (together.high - together.low)


def test_different_samples_are_not_compared() -> None:
    one = MetricSamples((1, 2), (0.0, 1.0), (1.0, 1.0))
    other = MetricSamples((1, 3), (0.0, 1.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="needs the same samples in the same order; 2 are in one run only"):
        paired_interval(one, other)
    with pytest.raises(ValueError, match="needs the same samples in the same order"):
        ratio_interval(one, other)
    zero = MetricSamples((1, 2), (0.0, 0.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="baseline other than 0"):
        ratio_interval(one, zero)


def test_a_function_of_sums_is_resampled_like_a_ratio_of_sums() -> None:
    rng = np.random.default_rng(3)
    hits, weights = rng.random(40), rng.integers(1, 5, 40).astype(float)
    images = tuple(int(image) for image in rng.integers(0, 12, 40))
    ratio = MetricSamples(tuple(range(40)), tuple(hits), tuple(weights), images)
    counts = tuple(zip(hits.tolist(), weights.tolist(), strict=True))
    sums = CorpusSamples(tuple(range(40)), counts, lambda found: found[..., 0] / found[..., 1], images)
    assert sums.value == pytest.approx(ratio.value)
    assert vars(interval(sums)) == pytest.approx(vars(interval(ratio)))
    better = CorpusSamples(sums.keys, tuple((h + 0.1 * w, w) for h, w in counts), sums.metric, images)
    gain = paired_interval(better, sums)
    assert (gain.low, gain.value, gain.high) == pytest.approx((0.1, 0.1, 0.1))
