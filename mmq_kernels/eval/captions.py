"""Caption metrics: CIDEr, BLEU-1..4, ROUGE-L by pycocoevalcap's scorers, METEOR where Java is.

References are tokenized once for a set of images; any number of caption sets is then scored against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.meteor import meteor_scores
from mmq_kernels.eval.tokenization import choose_tokenizer, java, tokenize

BLEU_ORDER = 4


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one set of captions.

    Attributes:
        tokenizer: `ptb` or `plain`.
        cider, bleu, rouge_l, meteor: of the corpus, on the scale of the papers' fractions (CIDEr 1.2, BLEU
            .4); `bleu` holds BLEU-1..4; `meteor` is None where it was not asked for or Java is missing.
        cider_per_image: in the order of the references given to `CaptionScorer`.
    """

    tokenizer: str
    cider: float
    bleu: tuple[float, ...]
    rouge_l: float
    meteor: float | None
    cider_per_image: tuple[float, ...]


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
        meteor: Callable[..., tuple[float, list[float]]] = meteor_scores,
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
            meteor: False spares METEOR's Java process (seconds).

        Raises:
            DataError: a caption is missing, or belongs to an image without references.
        """
        if captions.keys() != self._references.keys():
            odd = next(iter(captions.keys() ^ self._references.keys()))
            raise DataError(f"captions and references must cover the same images; image {odd} is in one only")
        truth = list(self._references.values())
        made = tokenize([captions[image_id] for image_id in self._references], self.tokenizer)
        refs, hyps = dict(enumerate(truth)), {i: [text] for i, text in enumerate(made)}
        cider, per_image = Cider().compute_score(refs, hyps)
        bleu, _ = Bleu(BLEU_ORDER).compute_score(refs, hyps, verbose=0)
        rouge, _ = Rouge().compute_score(refs, hyps)
        return CaptionScores(
            self.tokenizer,
            float(cider),
            tuple(float(value) for value in bleu),
            float(rouge),
            self._meteor(made, truth)[0] if meteor and java() else None,
            tuple(float(score) for score in np.asarray(per_image)),
        )
