"""Runs captioning and question answering: images once, then all prompts about them, then all references.

Work goes through in chunks of images, so that memory does not grow with the data; inside a chunk, sequences
of like length share a batch. An answer does not depend on the batch it was made in (up to rounding).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.generation import generate
from mmq_kernels.eval.images import PixelStore
from mmq_kernels.eval.nll import reference_nll
from mmq_kernels.eval.prompted import PromptedModel
from mmq_kernels.eval.protocol import Decoding
from mmq_kernels.eval.started import Started, start


@dataclass(frozen=True)
class Query:
    """What is asked about an image.

    Attributes:
        image: path of the image.
        prompt: text, or None where the image alone is given.
        references: texts whose likelihood is measured; none where it is not wanted.
    """

    image: Path
    prompt: str | None
    references: tuple[str, ...]


@dataclass
class Reply:
    """What a model said, and how likely it finds the references.

    Attributes:
        text: the generated answer; None where none was asked for.
        nll: nats, summed over the references' tokens; None without references.
        nll_tokens: tokens of the references.
    """

    text: str | None = None
    nll: float | None = None
    nll_tokens: int = 0


@dataclass
class Effort:
    """What a run cost.

    Attributes:
        seconds: by stage (`pixels`, `features`, `prompt`, `nll`, `generate`).
        tokens: generated, end tokens included.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Features(Protocol):
    """Keeps what the language model sees of images, for models that differ in the language model alone."""

    def __call__(self, images: Sequence[Path], look: Callable[[], Tensor], effort: Effort) -> Tensor:
        """`look()`, or what it gave for the same images before; its time counts in `effort` either way."""


def run_queries(
    model: PromptedModel,
    queries: Sequence[Query],
    pixels: PixelStore,
    *,
    decoding: Decoding | None,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    kept: Features | None = None,
) -> tuple[list[Reply], Effort]:
    """One reply a query, in order, and what they cost.

    Args:
        decoding: how answers are generated; None generates none (likelihoods only).
        batch_size: images or prompts a forward pass.
        progress: called with (queries done, queries in all).
        kept: image features of models before this one.

    Raises:
        DataError: an image cannot be read, or a reference is empty.
    """
    replies, effort, done = [Reply() for _ in queries], Effort(), 0
    for images, members in _chunks(queries, batch_size):
        look = partial(_look, model, images, pixels, effort)
        features = look() if kept is None else kept(images, look, effort)
        place = {path: i for i, path in enumerate(images)}
        rows = [model.encode(queries[q].prompt) for q in members]
        for part in _batches([len(row) for row in rows], batch_size):
            asked = [queries[members[i]] for i in part]
            answered = [replies[members[i]] for i in part]
            with effort.stage("prompt"):
                started = start(model, [rows[i] for i in part], features[[place[query.image] for query in asked]])
            with effort.stage("nll"):
                _add_likelihoods(model, started, asked, answered)
            if decoding is not None:
                with effort.stage("generate"):
                    texts, tokens = generate(model, started, decoding)
                effort.tokens += tokens
                for reply, text in zip(answered, texts, strict=True):
                    reply.text = text
        done += len(members)
        if progress is not None:
            progress(done, len(queries))
    return replies, effort


def _look(model: PromptedModel, images: Sequence[Path], pixels: PixelStore, effort: Effort) -> Tensor:
    with effort.stage("pixels"):
        values = pixels(images)
    with effort.stage("features"):
        return model.image_features(values)


def _add_likelihoods(
    model: PromptedModel, started: Started, queries: Sequence[Query], replies: Sequence[Reply]
) -> None:
    """Adds the likelihood of every reference of `queries` to their `replies`."""
    references = [
        [model.encode_answer(text, after_prompt=query.prompt is not None) for text in query.references]
        for query in queries
    ]
    if not all(tokens for texts in references for tokens in texts):
        raise DataError("a reference text has no tokens: its likelihood says nothing")
    for turn in range(max((len(texts) for texts in references), default=0)):
        chosen = [texts[turn] if turn < len(texts) else [] for texts in references]
        for reply, tokens, nll in zip(replies, chosen, reference_nll(started, chosen), strict=True):
            if tokens:
                reply.nll = nll + (reply.nll or 0.0)
                reply.nll_tokens += len(tokens)


def _chunks(queries: Sequence[Query], images: int) -> Iterator[tuple[list[Path], list[int]]]:
    """Images in order of first appearance, so many at a time, with the numbers of the queries about them."""
    by_image: dict[Path, list[int]] = {}
    for number, query in enumerate(queries):
        by_image.setdefault(query.image, []).append(number)
    paths = list(by_image)
    for first in range(0, len(paths), images):
        chunk = paths[first : first + images]
        yield chunk, [number for path in chunk for number in by_image[path]]


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches of like length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), size):
        yield order[first : first + size]
