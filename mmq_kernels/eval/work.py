"""Queries answered a chunk at a time: chunks are dealt out to ranks, kept in a log as they are done, and put together.

How queries are cut into chunks, and chunks into batches, depends on the data and the batch size alone. So what is
computed does not depend on the number of ranks or on where a run was interrupted, to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmq_kernels.eval.predictions import Entry, Log
from mmq_kernels.eval.team import ALONE, Progress, Tally, Team


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
        samples: that were computed, and not found in the log of an earlier run.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    samples: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @classmethod
    def of_all(cls, efforts: Sequence[Effort]) -> Effort:
        """Of ranks that worked side by side: the longest time of each stage, all tokens and samples."""
        stages = {name: None for effort in efforts for name in effort.seconds}
        return cls(
            {name: max(effort.seconds.get(name, 0.0) for effort in efforts) for name in stages},
            sum(effort.tokens for effort in efforts),
            sum(effort.samples for effort in efforts),
        )


@dataclass(frozen=True)
class Sharing:
    """Who works, and where what is done is kept."""

    team: Team = ALONE
    log: Log = field(default_factory=Log)
    progress: Progress | None = None


Answer = Callable[[list[int], Effort], list[Reply]]
"""Replies to the queries of these numbers, in order; what they cost is added to the effort."""


def answer_chunks(
    count: int, chunks: Sequence[list[int]], answer: Answer, sharing: Sharing
) -> tuple[list[Reply], Effort]:
    """One reply a query, in order, on every rank, and what they cost all.

    Args:
        count: queries in all.
        chunks: their numbers; each chunk is answered by one rank, and kept when it is done.
    """
    replies = _kept(sharing.log.kept)
    todo = [chunk for chunk in chunks if not all(number in replies for number in chunk)]
    effort, fresh = Effort(), dict[int, Reply]()
    tally = Tally(sharing.team, count, sharing.progress, count - sum(map(len, todo)))
    for turn in sharing.team.deal(len(todo)):
        members = todo[turn]
        answered = dict(zip(members, answer(members, effort), strict=True))
        sharing.log.write([{"sample": number, **asdict(reply)} for number, reply in answered.items()])
        fresh |= answered
        effort.samples += len(members)
        tally.add(len(members))
    tally.wait()
    for others, _ in (gathered := sharing.team.gather((fresh, effort))):
        replies |= others
    return [replies[number] for number in range(count)], Effort.of_all([each for _, each in gathered])


def _kept(entries: Sequence[Entry]) -> dict[int, Reply]:
    return {entry["sample"]: reply_of(entry, entry["text"]) for entry in entries}


def reply_of(kept: Mapping[str, Any], text: str | None) -> Reply:
    """The reply that an entry of a log or a record of predictions holds; a likelihood that is no number is null."""
    tokens, nll = kept.get("nll_tokens") or 0, kept.get("nll")
    return Reply(text, math.nan if tokens and nll is None else nll, tokens)


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Attention whose rounding does not depend on the number of threads: on the CPU the plain one.

    torch's fused one computes in buffers of each thread whose alignment differs, and MKL's sums with it.
    """
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
