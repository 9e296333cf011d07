"""Runs captioning and question answering: images once, then all prompts about them, then all references.

Work goes through in chunks of images, so that memory does not grow with the data; inside a chunk, sequences
of like length share a batch. An answer does not depend on the batch it was made in up to rounding, and batches do not
depend on how many ranks share the work: see `mmq_kernels.eval.work`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from mmq_kernels.eval.team import Progress
from mmq_kernels.eval.work import Effort, Query, Reply, Sharing, answer_chunks

__all__ = ["Effort", "Features", "Query", "Reply", "run_queries"]


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
    progress: Progress | None = None,
    kept: Features | None = None,
    sharing: Sharing | None = None,
) -> tuple[list[Reply], Effort]:
    """One reply a query, in order, and what they cost.

    Args:
        decoding: how answers are generated; None generates none (likelihoods only).
        batch_size: images or prompts a forward pass; so many images are a chunk, which one rank answers.
        progress: called with (queries done, queries in all).
        kept: image features of models before this one.
        sharing: which ranks share the work, and where it is kept; then it tells progress too.

    Raises:
        DataError: an image cannot be read, or a reference is empty.
    """

    def answer(members: list[int], effort: Effort) -> list[Reply]:
        return _answer(model, [queries[number] for number in members], pixels, decoding, batch_size, kept, effort)

    chunks = _chunks(queries, batch_size)
    return answer_chunks(len(queries), chunks, answer, sharing or Sharing(progress=progress))


def _answer(
    model: PromptedModel,
    queries: Sequence[Query],
    pixels: PixelStore,
    decoding: Decoding | None,
    batch_size: int,
    kept: Features | None,
    effort: Effort,
) -> list[Reply]:
    """Replies to a chunk."""
    images = list(dict.fromkeys(query.image for query in queries))
    look = partial(_look, model, images, pixels, effort)
    features = look() if kept is None else kept(images, look, effort)
    place = {path: i for i, path in enumerate(images)}
    rows = [model.encode(query.prompt) for query in queries]
    replies = [Reply() for _ in queries]
    for part in _batches([len(row) for row in rows], batch_size):
        asked, answered = [queries[i] for i in part], [replies[i] for i in part]
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
    return replies


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


def _chunks(queries: Sequence[Query], images: int) -> list[list[int]]:
    """Numbers of the queries about so many images at a time, which are in order of first appearance."""
    by_image: dict[Path, list[int]] = {}
    for number, query in enumerate(queries):
        by_image.setdefault(query.image, []).append(number)
    about = list(by_image.values())
    return [
        [number for members in about[first : first + images] for number in members]
        for first in range(0, len(about), images)
    ]


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches of like length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), size):
        yield order[first : first + size]
