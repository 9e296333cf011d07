"""Batched generation: from prompts that were read to texts."""

from __future__ import annotations

from mmq_kernels.eval.prompted import PromptedModel
from mmq_kernels.eval.protocol import Decoding
from mmq_kernels.eval.started import Started


def generate(model: PromptedModel, started: Started, decoding: Decoding) -> tuple[list[str], int]:
    """Answers to the prompts of `started`, and how many tokens they took (end tokens included).

    Args:
        started: from `mmq_kernels.eval.started.start`; used up by this.
        decoding: greedy or beam search, and its lengths.
    """
    rows = [until_end(row, model.ends) for row in started.generate(decoding).tolist()]
    texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [text.strip() for text in texts], sum(len(row) for row in rows)


def until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    """`row` up to and with its first end token: what follows is padding."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: stop + 1]
