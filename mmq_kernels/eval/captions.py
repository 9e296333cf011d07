"""Caption metrics: CIDEr, BLEU-1..4, ROUGE-L by pycocoevalcap's scorers, METEOR where Java is, SPICE where its models
are.

References are tokenized once for a set of images; any number of caption sets is then scored against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from mmq_kernels.eval.corpus import bleu, bleu_counts
from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.meteor import Scores, meteor_scores
from mmq_kernels.eval.spice import spice_missing, spice_scores
from mmq_kernels.eval.tokenization import choose_tokenizer, java, tokenize

BLEU_ORDER = 4


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one set of captions.

    Attributes:
        tokenizer: `ptb` or `plain`.
        metrics: of the corpus, on the scale of the papers' fractions (CIDEr 1.2, BLEU .4): `cider`, `bleu_1` ..
            `bleu_4`, `rouge_l`, `meteor`, `spice`; None where one was not computed.
        not_computed: why, for each of those.
        per_image: in the order of the references given to `CaptionScorer`: `cider`, `rouge_l` and `spice` of the image,
            `bleu_counts` and `meteor_counts` of which the corpus' BLEU and METEOR are made (see `corpus`).
    """

    tokenizer: str
    metrics: dict[str, float | None]
    not_computed: dict[str, str]
    per_image: tuple[dict[str, Any], ...]


class CaptionScorer:
    """Scores captions against the references of a fixed set of images.

    CIDEr weighs n-grams by how many of *these* images' references hold them, so its value depends on the set.

    Args:
        references: captions of each image.
        tokenizer: `ptb`, `plain`, or `auto` (`ptb` where Java is found).
        meteor: gives METEOR's scores; one that keeps its Java process serves many sets of captions.

    Raises:
        DataError: an image without references; `ptb` without Java.
    """

    def __init__(
        self,
        references: Mapping[Any, Sequence[str]],
        *,
        tokenizer: str = "auto",
        meteor: Callable[..., Scores] = meteor_scores,
    ) -> None:
        self.tokenizer, self._meteor = choose_tokenizer(tokenizer), meteor
        for image_id, texts in references.items():
            if not texts:
                raise DataError(f"image {image_id} has no reference captions")
        tokens = iter(tokenize([text for texts in references.values() for text in texts], self.tokenizer))
        self._references = {key: [next(tokens) for _ in texts] for key, texts in references.items()}

    def score(self, captions: Mapping[Any, str], *, meteor: bool = True) -> CaptionScores:
        """Scores of exactly one caption an image.

        Args:
            captions: by the ids the references came with.
            meteor: False spares the Java processes of METEOR (seconds) and SPICE (minutes).

        Raises:
            DataError: a caption is missing, or belongs to an image without references.
        """
        if captions.keys() != self._references.keys():
            odd = next(iter(captions.keys() ^ self._references.keys()))
            raise DataError(f"captions and references must cover the same images; image {odd} is in one only")
        truth = list(self._references.values())
        made = tokenize([captions[image_id] for image_id in self._references], self.tokenizer)
        refs, hyps = dict(enumerate(truth)), {i: [text] for i, text in enumerate(made)}
        cider, ciders = Cider().compute_score(refs, hyps)
        rouge, rouges = Rouge().compute_score(refs, hyps)
        counts = bleu_counts(made, truth, BLEU_ORDER)
        bleus = {f"bleu_{n}": float(bleu(np.sum(counts, 0), n)) for n in range(1, BLEU_ORDER + 1)}
        series = {
            "cider": [float(score) for score in ciders],
            "rouge_l": [float(score) for score in rouges],
            "bleu_counts": counts,
        }
        metrics: dict[str, float | None] = {"cider": float(cider), **bleus, "rouge_l": float(rouge)}
        with_java, not_computed = self._with_java(made, truth) if meteor else ({}, {})
        metrics |= {name: None for name in ("meteor", "spice")}
        for name, (value, values) in with_java.items():
            metrics[name] = value
            series["meteor_counts" if name == "meteor" else name] = values
        if not meteor:
            not_computed = dict.fromkeys(("meteor", "spice"), "not asked for")
        per_image = tuple(dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True))
        return CaptionScores(self.tokenizer, metrics, not_computed, per_image)

    def _with_java(
        self, made: list[str], truth: list[list[str]]
    ) -> tuple[dict[str, tuple[float, list[Any]]], dict[str, str]]:
        """METEOR and SPICE of the corpus with what they are made of, image by image; or why they could not be had."""
        found: dict[str, tuple[float, list[Any]]] = {}
        reasons: dict[str, str] = {}
        if java() is None:
            reasons["meteor"] = "METEOR needs Java, and no java is on the PATH"
        else:
            value, _, counts = self._meteor(made, truth)
            found["meteor"] = (value, counts)
        why_not = spice_missing()
        if why_not is not None:
            reasons["spice"] = why_not
        else:
            found["spice"] = spice_scores(made, truth)
        return found, reasons
