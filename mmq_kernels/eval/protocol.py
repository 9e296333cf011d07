"""Prompts and decoding settings: one table, keyed by model family, its language model, and task.

Source: the study's settings (arXiv 2601.15287) and BLIP-2's own evaluation (LAVIS).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
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
        layout: how ``{image}`` and ``{text}`` stand together where the processor has no chat template, which goes
            before; None where the prompt is all there is to write, the model placing the image itself.
    """

    prompt: str | None
    decoding: Decoding
    layout: str | None = None

    def text(self, question: str | None = None) -> str | None:
        """The prompt for `question`."""
        return None if self.prompt is None else self.prompt.replace("{}", question or "")

    def settings(self) -> dict[str, Any]:
        """What a result says about it."""
        return {"prompt": self.prompt, "decoding": asdict(self.decoding)}


ANY = "*"
_Rows = dict[tuple[str, str, str], Protocol]


def _rows(family: str, language: str, caption: Protocol, question: Protocol) -> _Rows:
    return {
        (family, language, "caption"): caption,
        (family, language, "vqa"): question,
        (family, language, "gqa"): question,
    }


def _short_answer(length_penalty: float) -> Protocol:
    decoding = Decoding(10, 5, min_new_tokens=1, length_penalty=length_penalty)
    return Protocol("Question: {} Short answer:", decoding)


_BLIP2 = Protocol(None, Decoding(30))
_INSTRUCTBLIP = Protocol("A short image description.", Decoding(30, 5))
_CHAT = "USER: {image}\n{text} ASSISTANT:"

PROTOCOLS: _Rows = {
    **_rows("blip-2", "opt", _BLIP2, _short_answer(0.0)),
    **_rows("blip-2", "t5", _BLIP2, _short_answer(-1.0)),
    **_rows("instructblip", "llama", _INSTRUCTBLIP, _short_answer(0.0)),
    **_rows("instructblip", "t5", _INSTRUCTBLIP, _short_answer(-1.0)),
    **_rows(
        "paligemma",
        ANY,
        Protocol("caption en", Decoding(30), "{image}{text}"),
        Protocol("answer en {}", Decoding(10), "{image}{text}"),
    ),
    **_rows(
        ANY,
        ANY,
        Protocol("Provide a one-sentence caption for the provided image.", Decoding(30), _CHAT),
        Protocol("{}\nAnswer the question using a single word or phrase.", Decoding(10), _CHAT),
    ),
}
"""(model type, its language model's type, task) -> protocol; `ANY` for models that no other row names.

BLIP-2's prompts and decoding and LLaVA's prompt for questions are the study's; InstructBLIP's are its authors' (LAVIS),
PaliGemma's those that it was trained on, the caption prompt for all others lmms-eval's.
"""


def protocol_for(model: Any, task: str) -> Protocol:
    """The protocol of `model` (a transformers model) for `task`.

    A model that was trained on prompts of its own says so in its config: ``task_specific_params`` holds
    ``{task: {"prompt": "..."}}``.

    Raises:
        ModelMismatch: no entry for this family, or a prompt of its own that has no place for the question.
    """
    config = model.config
    family = config.model_type
    language = getattr(getattr(config, "text_config", None), "model_type", "none")
    named = family if any(family == known for known, _, _ in PROTOCOLS) else ANY
    protocol = PROTOCOLS.get((named, language, task)) or PROTOCOLS.get((named, ANY, task))
    if protocol is None:
        known = sorted({f"{family} with {language}" for family, language, name in PROTOCOLS if name == task})
        raise ModelMismatch(
            f"no prompt for task {task} with {family} over {language}; known: {', '.join(known) or 'none'}"
        )
    own = _own_prompt(config, task)
    return protocol if own is None else replace(protocol, prompt=own)


def lay_out(processor: Any, protocol: Protocol, prompt: str, answer: str | None = None) -> str:
    """The text that `processor` is given with an image: by its chat template, or as `protocol` says.

    Args:
        prompt: from `Protocol.text`.
        answer: what was answered; None where the model is to answer.
    """
    if protocol.layout is None:
        text = prompt
    elif getattr(processor, "chat_template", None):
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        if answer is not None:
            said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return processor.apply_chat_template(said, add_generation_prompt=answer is None, tokenize=False)
    else:
        token = getattr(processor, "image_token", "<image>")
        written = str(getattr(token, "content", token))  # some keep it as a token, not as a text
        text = protocol.layout.replace("{image}", written).replace("{text}", prompt)
    return text if answer is None else f"{text} {answer}"


def _own_prompt(config: Any, task: str) -> str | None:
    params = getattr(config, "task_specific_params", None)
    own = params.get(task) if isinstance(params, dict) else None
    prompt = own.get("prompt") if isinstance(own, dict) else None
    if prompt is None:
        return None
    if not isinstance(prompt, str) or (task != "caption" and prompt.count("{}") != 1):
        raise ModelMismatch(
            f"the prompt for task {task} in the config's task_specific_params must be a text with one {{}} for the "
            f"question, got {prompt!r}"
        )
    return prompt


def clean_caption(caption: str) -> str:
    """A caption as BLIP-2 was trained on it: lower case, sentence punctuation stripped, at most 50 words.

    >>> clean_caption("A man: riding (a wave).")
    'a man riding a wave'
    """
    return " ".join(_STRIPPED.sub(" ", caption.lower()).split()[:MAX_CAPTION_WORDS])
