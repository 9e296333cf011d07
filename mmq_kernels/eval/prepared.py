"""What does not depend on the model, made once: samples, pixel values, tokenized references."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from mmq_kernels.eval.captions import CaptionScorer
from mmq_kernels.eval.datasets import CaptionSample, Samples, default_split, load
from mmq_kernels.eval.generative import Features
from mmq_kernels.eval.images import PixelStore


@dataclass(frozen=True)
class Prepared:
    """Samples of a task, ready for any number of models that share a processor. Made by `prepare`.

    With `features`, models share what they see of images too: only for models that differ in the language model alone.
    """

    task: str
    folder: Path
    split: str
    limit: int | None
    seed: int
    captions_per_image: int | None
    samples: Samples
    processor: Any
    pixels: PixelStore
    tokenizer: str
    _scorers: list[CaptionScorer] = field(default_factory=list, repr=False)
    features: Features | None = field(default=None, repr=False)

    def caption_samples(self) -> list[CaptionSample]:
        """The samples of task `caption`."""
        return cast("list[CaptionSample]", self.samples)

    def caption_scorer(self) -> CaptionScorer:
        """The scorer of these samples' references, which are tokenized on the first call."""
        if not self._scorers:
            references = {s.image_id: s.references for s in self.caption_samples()}
            self._scorers.append(CaptionScorer(references, tokenizer=self.tokenizer))
        return self._scorers[0]

    def sharing(self, features: Features | None, scorer: CaptionScorer | None = None) -> Prepared:
        """The same data, with image features kept by `features`, and captions scored by `scorer` if one is given."""
        return replace(self, features=features, _scorers=self._scorers if scorer is None else [scorer])

    def settings(self) -> dict[str, Any]:
        """What a result says about its data."""
        data = {"data": str(self.folder), "split": self.split, "limit": self.limit, "seed": self.seed}
        return data | ({"captions_per_image": self.captions_per_image} if self.task == "retrieval" else {})


def prepare(
    task: str,
    folder: str | Path,
    processor: Any,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    captions_per_image: int | None = None,
    tokenizer: str = "auto",
    pixels: PixelStore | None = None,
) -> Prepared:
    """Reads what `task` needs from `folder`.

    Args:
        processor: of the models to be evaluated.
        split, limit, seed, captions_per_image: see `mmq_kernels.eval.datasets.load`.
        tokenizer: of captions before scoring: `ptb`, `plain`, or `auto` (`ptb` where Java is).
        pixels: a store to share between tasks with the same images and processor.

    Raises:
        DataError: the data is missing, damaged or of another layout.
        ValueError: unknown task or split.
    """
    samples = load(task, folder, split, limit=limit, seed=seed, captions_per_image=captions_per_image)
    store = PixelStore(processor) if pixels is None else pixels
    return Prepared(
        task=task,
        folder=Path(folder),
        split=split or default_split(task),
        limit=limit,
        seed=seed,
        captions_per_image=captions_per_image,
        samples=samples,
        processor=processor,
        pixels=store,
        tokenizer=tokenizer,
    )
