"""Runs captioning and question answering: images once, then all prompts about them, then all references.

Work goes through in chunks of images, so that memory does not grow with the data; inside a chunk, sequences
of like length share a batch. An answer does not depend on the batch it was made in (up to rounding).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mmq_kernels.eval.generation import generate
from mmq_kernels.eval.images import PixelStore
from mmq_kernels.eval.nll import reference_nll
from mmq_kernels.eval.prompted import PromptedModel
from mmq_kernels.eval.protocol import Decoding


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
        seconds: by stage (`pixels`, `features`, `generate`, `nll`).
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


def run_queries(
    model: PromptedModel,
    queries: Sequence[Query],
    pixels: PixelStore,
    *,
    decoding: Decoding | None,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Reply], Effort]:
    """One reply a query, in order, and what they cost.

    Args:
        decoding: how answers are generated; None generates none (likelihoods only).
        batch_size: images, prompts or references a forward pass.
        progress: called with (queries done, queries in all).

    Raises:
        DataError: an image cannot be read, or a reference is empty.
    """
    replies, effort, done = [Reply() for _ in queries], Effort(), 0
    for images, members in _chunks(queries, batch_size):
        with effort.stage("pixels"):
            values = pixels(images)
        with effort.stage("features"):
            features = model.image_features(values)
        place = {path: i for i, path in enumerate(images)}
        rows = [model.encode(queries[q].prompt) for q in members]
        at = [place[queries[q].image] for q in members]
        if decoding is not None:
            with effort.stage("generate"):
                for part in _batches([len(row) for row in rows], batch_size):
                    texts, tokens = generate(
                        model, [rows[i] for i in part], features[[at[i] for i in part]], decoding
                    )
                    effort.tokens += tokens
                    for i, text in zip(part, texts, strict=True):
                        replies[members[i]].text = text
        with effort.stage("nll"):
            _add_likelihoods(
                model, [queries[q] for q in members], rows, at, features, batch_size, members, replies
            )
        done += len(members)
        if progress is not None:
            progress(done, len(queries))
    return replies, effort


def _add_likelihoods(
    model: PromptedModel,
    queries: Sequence[Query],
    rows: Sequence[list[int]],
    at: Sequence[int],
    features: Tensor,
    batch_size: int,
    members: Sequence[int],
    replies: list[Reply],
) -> None:
    """Puts the likelihood of every reference into the reply of its query."""
    pairs = [
        (i, model.encode_answer(text, after_prompt=query.prompt is not None))
        for i, query in enumerate(queries)
        for text in query.references
    ]
    for part in _batches([len(rows[i]) + len(tokens) for i, tokens in pairs], batch_size):
        chosen = [pairs[p] for p in part]
        sums = reference_nll(
            model,
            [rows[i] for i, _ in chosen],
            [tokens for _, tokens in chosen],
            features[[at[i] for i, _ in chosen]],
        )
        for (i, tokens), nll in zip(chosen, sums, strict=True):
            reply = replies[members[i]]
            reply.nll = nll + (reply.nll or 0.0)
            reply.nll_tokens += len(tokens)


def _chunks(queries: Sequence[Query], images: int) -> Iterator[tuple[list[Path], list[int]]]:
    """Images in order of first appearance, so many at a time, with the numbers of the queries about them."""
    by_image: dict[Path, list[int]] = {}
    for number, query in enumerate(queries):
        by_image.setdefault(query.image, []).append(number)
    paths = list(by_image)
    for start in range(0, len(paths), images):
        chunk = paths[start : start + images]
        yield chunk, [number for path in chunk for number in by_image[path]]


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of `lengths` in batches of like length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]
