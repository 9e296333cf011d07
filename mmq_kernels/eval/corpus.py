"""BLEU and METEOR of a corpus as functions of sums over its captions, so that they can be resampled.

``BLEU-n = min(1, exp(1 - r/c)) * (prod_k correct_k / guessed_k)^(1/n)``; METEOR is the harmonic mean of weighted
unigram precision and recall, less a penalty for chunks. Tests hold both equal to pycocoevalcap's.

Source: Papineni et al., "BLEU" (2002); Denkowski and Lavie, "Meteor Universal" (2014), English, task `rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pycocoevalcap.bleu.bleu_scorer import BleuScorer

Values = npt.NDArray[np.float64]

_SMALL, _TINY = 1e-9, 1e-15
"""What pycocoevalcap adds to denominators and numerators."""

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STAGES = np.array([1.0, 0.6, 0.8, 0.6])
"""Weights of matches: exact, by stem, by synonym, by paraphrase."""


def bleu_counts(captions: Sequence[str], references: Sequence[Sequence[str]], order: int) -> list[list[int]]:
    """For each tokenized caption its length, that of the closest reference, and its n-grams: guessed, then correct.

    Each row has ``2 + 2 * order`` counts.
    """
    scorer = BleuScorer(n=order)
    for caption, texts in zip(captions, references, strict=True):
        scorer += (caption, list(texts))
    rows = []
    for found in scorer.ctest:
        length = found["testlen"]
        closest = min((abs(other - length), other) for other in found["reflen"])[1]
        rows.append([length, closest, *found["guess"], *found["correct"]])
    return rows


def bleu(sums: Values, order: int) -> Values:
    """BLEU-`order` of sums of `bleu_counts` ``[..., counts]``."""
    most = (sums.shape[-1] - 2) // 2
    guessed, correct = sums[..., 2 : 2 + order], sums[..., 2 + most : 2 + most + order]
    precision = np.prod((correct + _TINY) / (guessed + _SMALL), -1) ** (1 / order)
    ratio = (sums[..., 0] + _TINY) / (sums[..., 1] + _SMALL)
    return precision * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)


def meteor(sums: Values) -> Values:
    """METEOR of sums of the counts of each caption ``[..., 23]``, from `mmq_kernels.eval.meteor`.

    They are: length of caption and reference, function words of both; for each stage the matches of content words in
    caption and reference and of function words in both; chunks, matched words in caption and in reference.
    """
    lengths, function = sums[..., :2], sums[..., 2:4]
    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # stage, content or function, caption or reference
    content_matches, function_matches = ((stages[..., kind, :] * _STAGES[:, None]).sum(-2) for kind in (0, 1))
    matched = _DELTA * content_matches + (1 - _DELTA) * function_matches
    written = _DELTA * (lengths - function) + (1 - _DELTA) * function
    share = _ratio(matched, written)
    precision, recall = share[..., 0], share[..., 1]
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _ratio(sums[..., 20], sums[..., 21:23].mean(-1))
    return mean * (1 - _GAMMA * fragmentation**_BETA)


def _ratio(numerator: Values, denominator: Values) -> Values:
    """0 where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
