"""Prompts and decoding settings: one table, keyed by model family, its language model, and task.

Source: the study's settings (arXiv 2601.15287) and BLIP-2's own evaluation (LAVIS).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from mmq_kernels.eval.errors import ModelMismatch

MAX_CAPTION_WORDS = 50
_STRIPPED = re.compile(r"[.!\"()*#:;~]")


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated: greedy with one beam, else beam search. Lengths in tokens."""

    max_new_tokens: int
    num_beams: int = 1
    min_new_tokens: int = 0
    length_penalty: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `generate`."""
        arguments: dict[str, Any] = {
            "do_sample": False,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
        }
        if self.min_new_tokens:
            arguments["min_new_tokens"] = self.min_new_tokens
        if self.num_beams > 1:
            arguments["length_penalty"] = self.length_penalty
        return arguments


@dataclass(frozen=True)
class Protocol:
    """What a model is asked and how it answers.

    Attributes:
        prompt: template with one ``{}`` for the question; None where the image alone is given.
        decoding: of the answer.
    """

    prompt: str | None
    decoding: Decoding

    def text(self, question: str | None = None) -> str | None:
        """The prompt for `question`."""
        return None if self.prompt is None else self.prompt.format(question)

    def settings(self) -> dict[str, Any]:
        """What a result says about it."""
        return {"prompt": self.prompt, "decoding": asdict(self.decoding)}


_BLIP2_CAPTION = Protocol(None, Decoding(max_new_tokens=30))
_BLIP2_QUESTION = "Question: {} Short answer:"

_BLIP2_ANSWER = {"opt": 0.0, "t5": -1.0}
"""Length penalty by language model."""

PROTOCOLS: dict[tuple[str, str, str], Protocol] = {
    ("blip-2", "opt", "caption"): _BLIP2_CAPTION,
    ("blip-2", "t5", "caption"): _BLIP2_CAPTION,
    **{
        ("blip-2", language, task): Protocol(_BLIP2_QUESTION, Decoding(10, 5, min_new_tokens=1, length_penalty=penalty))
        for language, penalty in _BLIP2_ANSWER.items()
        for task in ("vqa", "gqa")
    },
}
"""(model type, its language model's type, task) -> protocol."""


def protocol_for(model: Any, task: str) -> Protocol:
    """The protocol of `model` (a transformers model) for `task`.

    Raises:
        ModelMismatch: no entry for this family.
    """
    config = model.config
    text_config = getattr(config, "text_config", None)
    key = (config.model_type, getattr(text_config, "model_type", "none"), task)
    if key not in PROTOCOLS:
        known = sorted({f"{family} with {language}" for family, language, name in PROTOCOLS if name == task})
        raise ModelMismatch(
            f"no prompt for task {task} with {key[0]} over {key[1]}; known: {', '.join(known) or 'none'}"
        )
    return PROTOCOLS[key]


def clean_caption(caption: str) -> str:
    """A caption as BLIP-2 was trained on it: lower case, sentence punctuation stripped, at most 50 words.

    >>> clean_caption("A man: riding (a wave).")
    'a man riding a wave'
    """
    return " ".join(_STRIPPED.sub(" ", caption.lower()).split()[:MAX_CAPTION_WORDS])
