"""Methods against each other at matched settings: the same factors at the same values, and all else the same too.

GPTQ per channel against AWQ in groups of 128 says little about either method. Two results are matched where their
factors are equal and their recipes differ in the method alone. Where no two are, those with equal factors are compared,
and what else differs is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmq_kernels.eval.bootstrap import MetricSamples, paired_tests
from mmq_kernels.quantize import Recipe
from mmq_kernels.sweep.differences import PAIRED, RESAMPLES, SIGNIFICANT, UNTESTED, alike, holm
from mmq_kernels.sweep.fronts import sign, untouched
from mmq_kernels.sweep.predictions import Predictions
from mmq_kernels.sweep.store import Result

RANKED = "Wilcoxon's signed ranks over the settings"
LEAST_SETTINGS = 6
"""Below that signed ranks cannot reach 5%."""
READ_SETTINGS = 64
"""Of more settings a sample has its predictions read."""

UNRECORDED = "recipes not recorded"

Key = tuple[object, ...]


@dataclass(frozen=True)
class Matched:
    """One setting under two methods."""

    factors: dict[str, float | str]
    one: str
    other: str
    values: tuple[float, float]

    @property
    def difference(self) -> float:
        return self.values[0] - self.values[1]


@dataclass(frozen=True)
class Comparison:
    """Two methods on one model and task.

    Attributes:
        one, other: the methods.
        settings: what was measured under both, but for everything left alone.
        unlike: what differs beside the method, "one / other"; empty where the settings are matched.
        mean: mean over the settings of the metric of `one` minus that of `other`.
        low, high: ends of its 95% interval, None where it is not tested.
        wins, losses: settings in which `one` is better, and worse.
        p, adjusted: as in `Difference`; corrected over the pairs of methods of this model and task.
        how: by what it is tested, and over how much.
    """

    model: str
    task: str
    metric: str
    one: str
    other: str
    settings: list[Matched]
    unlike: list[str] = field(default_factory=list)
    mean: float = 0.0
    low: float | None = None
    high: float | None = None
    wins: int = 0
    losses: int = 0
    p: float | None = None
    adjusted: float | None = None
    how: str = UNTESTED

    @property
    def real(self) -> bool | None:
        """Whether the methods differ at the 5% level, corrected; None where that is not tested."""
        return None if self.adjusted is None else self.adjusted < SIGNIFICANT

    @property
    def better(self) -> str:
        """The method that is ahead in the mean."""
        return self.one if sign(self.metric) * self.mean >= 0 else self.other


def compare_methods(
    results: Sequence[Result], metric: str, predictions: Predictions, *, seed: int = 0
) -> list[Comparison]:
    """Every two methods that share settings, of results of one model and task.

    Args:
        results: those without the metric are left out.
        metric: in which they are compared.
        predictions: where per-sample predictions are read from.
        seed: of the bootstrap and of the settings whose predictions are read.
    """
    settings: dict[Key, list[Result]] = {}
    for result in results:
        if metric in result.metrics and not untouched(result):
            settings.setdefault(_factors(result), []).append(result)
    matched: dict[str, dict[Key, Result]] = {}
    by_factors: dict[str, dict[Key, Result]] = {}
    for factors, members in settings.items():
        for result in members if len({each.method for each in members}) > 1 else ():
            by_factors.setdefault(result.method, {}).setdefault(factors, result)
            if result.recipe:
                key = (factors, tuple(sorted(_granularities(result.recipe).items())))
                matched.setdefault(result.method, {}).setdefault(key, result)
    found = []
    for one, other in itertools.combinations(sorted(by_factors), 2):
        pairs = _shared(matched.get(one, {}), matched.get(other, {}))
        unlike = []
        if not pairs:
            pairs = _shared(by_factors[one], by_factors[other])
            unlike = sorted(set().union(*(_unlike(*pair) for pair in pairs)))
        if pairs:
            found.append(_compare(one, other, pairs, unlike, metric, predictions, seed))
    adjusted = iter(holm([each.p for each in found if each.p is not None]))
    return [each if each.p is None else Comparison(**{**vars(each), "adjusted": next(adjusted)}) for each in found]


def _factors(result: Result) -> Key:
    return tuple(sorted(result.factors.items()))


def _shared(ours: Mapping[Key, Result], theirs: Mapping[Key, Result]) -> list[tuple[Result, Result]]:
    return [(result, theirs[key]) for key, result in ours.items() if key in theirs]


def _compare(
    one: str,
    other: str,
    pairs: list[tuple[Result, Result]],
    unlike: list[str],
    metric: str,
    predictions: Predictions,
    seed: int,
) -> Comparison:
    settings = [
        Matched(dict(a.factors), a.fingerprint, b.fingerprint, (a.metrics[metric], b.metrics[metric])) for a, b in pairs
    ]
    gaps = np.array([setting.difference for setting in settings])
    better = sign(metric) * gaps
    low, high, chance, how = _tested(settings, gaps, metric, predictions, seed)
    return Comparison(
        pairs[0][0].model,
        pairs[0][0].task,
        metric,
        one,
        other,
        settings,
        unlike,
        float(gaps.mean()),
        low,
        high,
        int((better > 0).sum()),
        int((better < 0).sum()),
        chance,
        None,
        how,
    )


def _unlike(one: Result, other: Result) -> set[str]:
    """What their recipes say of layers beside method and bits, where it differs."""
    if not one.recipe or not other.recipe:
        return {UNRECORDED}
    ours, theirs = (_granularities(result.recipe) for result in (one, other))
    return {
        f"{ours.get(target, '16 bits')} / {theirs.get(target, '16 bits')}"
        for target in ours.keys() | theirs.keys()
        if ours.get(target) != theirs.get(target)
    }


def _granularities(recipe: str) -> dict[str, str]:
    """By target the groups and the symmetry: what stands behind method and bits in the one-line form."""
    rules = (str(rule).rpartition("=") for rule in Recipe.parse(recipe).rules if rule.method is not None)
    return {target: " ".join(action.split(":")[2:]) for target, _, action in rules}


def _tested(
    settings: Sequence[Matched], gaps: np.ndarray, metric: str, predictions: Predictions, seed: int
) -> tuple[float | None, float | None, float | None, str]:
    """Ends of the mean's interval, p, and how they were found."""
    pairs = _series(settings, metric, predictions, seed)
    if pairs:
        ours, theirs = (_mean(side) for side in zip(*pairs, strict=True))
        ((interval, chance),) = paired_tests([ours], theirs, seed=seed, resamples=RESAMPLES)
        shift = float(gaps.mean()) - interval.value  # where the predictions of a sample of the settings were read
        return interval.low + shift, interval.high + shift, chance, f"{PAIRED}, {len(pairs)} settings"
    if len(settings) < LEAST_SETTINGS:
        return None, None, None, UNTESTED
    from scipy.stats import wilcoxon

    drawn = np.random.default_rng(seed).choice(gaps, (RESAMPLES, len(gaps))).mean(1) if len(gaps) <= 2_000 else None
    error = 1.96 * float(gaps.std(ddof=1)) / len(gaps) ** 0.5
    low, high = np.percentile(drawn, [2.5, 97.5]) if drawn is not None else (gaps.mean() - error, gaps.mean() + error)
    chance = float(wilcoxon(gaps).pvalue) if np.any(gaps) else 1.0
    return float(low), float(high), chance, f"{RANKED}, {len(settings)} of them"


def _series(
    settings: Sequence[Matched], metric: str, predictions: Predictions, seed: int
) -> list[tuple[MetricSamples, MetricSamples]]:
    """Both methods sample by sample, of settings that have all samples in common."""
    there = [each for each in settings if predictions.there(each.one) and predictions.there(each.other)]
    some = sorted(np.random.default_rng(seed).permutation(len(there))[:READ_SETTINGS])
    read = [(predictions.samples(there[i].one, metric), predictions.samples(there[i].other, metric)) for i in some]
    known = [(ours, theirs) for ours, theirs in read if ours is not None and theirs is not None]
    return [pair for pair in known if alike(pair[0], known[0][0]) and alike(pair[1], known[0][0])]


def _mean(series: Sequence[MetricSamples]) -> MetricSamples:
    """The mean of several settings, sample by sample."""
    return MetricSamples(
        series[0].keys,
        tuple(np.mean([each.numerator for each in series], 0).tolist()),
        tuple(np.mean([each.denominator for each in series], 0).tolist()),
        series[0].clusters,
    )
