"""Any generative VLM, asked through its own processor and its own `generate`: LLaVA and its kin, Qwen, InstructBLIP.

Slower than a model opened at its seams (`prompted`): an image is encoded again for each question about it, and a
reference's likelihood is measured by making `generate` say it, token by token, which every model that generates can do
and where no token can see the ones behind it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mmq_kernels.eval.errors import DataError, ModelMismatch
from mmq_kernels.eval.generation import until_end
from mmq_kernels.eval.images import open_image
from mmq_kernels.eval.protocol import Decoding, Protocol, lay_out
from mmq_kernels.eval.team import Progress
from mmq_kernels.eval.work import Effort, Query, Reply, Sharing, answer_chunks


class ProcessedModel:
    """`model` with the processor that belongs to it.

    Args:
        model: a transformers model with `generate`, quantized or not.
        processor: makes its inputs of images and texts.
        protocol: says how an image and a prompt stand together.

    Raises:
        ModelMismatch: the model does not generate, or the processor does not take images and texts.
    """

    def __init__(self, model: Any, processor: Any, protocol: Protocol) -> None:
        if not getattr(model, "can_generate", lambda: False)():
            raise ModelMismatch(f"a generative task needs a model that generates text, {type(model).__name__} does not")
        for part in ("image_processor", "tokenizer"):
            if getattr(processor, part, None) is None:
                raise ModelMismatch(
                    f"a generative task needs a processor with {part}, {type(processor).__name__} has none"
                )
        self.model, self.processor, self.protocol = model, processor, protocol
        self.tokenizer = processor.tokenizer
        self.encoder_decoder = bool(getattr(model.config, "text_config", model.config).is_encoder_decoder)
        forward, generate = (inspect.signature(call).parameters for call in (model.forward, model.generate))
        self._taken = {*forward, *generate}
        generation = _generation_config(model)
        ends = generation.eos_token_id if generation.eos_token_id is not None else self.tokenizer.eos_token_id
        self.ends = frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])
        pads = (self.tokenizer.pad_token_id, generation.pad_token_id, *sorted(self.ends), 0)
        self.pad = next(pad for pad in pads if pad is not None)

    def lay_out(self, prompt: str) -> str:
        """The text that stands with an image: see `mmq_kernels.eval.protocol.lay_out`."""
        return lay_out(self.processor, self.protocol, prompt)

    def inputs(self, images: Sequence[Path], texts: Sequence[str]) -> dict[str, Any]:
        """What `generate` takes, left-padded, on the model's device and in its dtype.

        Args:
            texts: from `lay_out`, one an image.

        Raises:
            DataError: an image cannot be read.
        """
        opened = [[open_image(path)] for path in images]
        start = self.tokenizer.bos_token
        written = {"add_special_tokens": False} if start and texts[0].startswith(start) else {}
        with _padded_left(self.tokenizer):
            made = self.processor(images=opened, text=list(texts), padding=True, return_tensors="pt", **written)
        if "qformer_input_ids" in made:
            _pad_right(made, "qformer_input_ids", "qformer_attention_mask")
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in made.items()
            if name in self._taken and isinstance(value, Tensor)
        }

    @torch.inference_mode()
    def generate(self, inputs: dict[str, Any], decoding: Decoding) -> tuple[list[str], int]:
        """Answers without the prompt, and how many tokens they took (end tokens included)."""
        output = self.model.generate(**inputs, pad_token_id=self.pad, **decoding.arguments())
        rows = [until_end(row, self.ends) for row in self._new(output, inputs).tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts], sum(len(row) for row in rows)

    def _new(self, output: Tensor, inputs: dict[str, Any]) -> Tensor:
        """`output` without the start token of a decoder, or without the prompt where it is echoed."""
        if self.encoder_decoder:
            return output[:, 1:]
        prompt = inputs["input_ids"]
        width = prompt.shape[1]
        echoed = output.shape[1] >= width and torch.equal(output[:, :width], prompt)
        return output[:, width:] if echoed else output

    def encode_answer(self, prompt: str, answer: str) -> list[int]:
        """Tokens of a reference as they stand behind the laid out `prompt`."""
        if self.encoder_decoder:
            return list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        spaced = answer if prompt[-1:].isspace() else f" {answer}"
        before = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        both = self.tokenizer(prompt + spaced, add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before:
            return list(both[len(before) :])
        return list(self.tokenizer(spaced, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def reference_nll(self, inputs: dict[str, Any], references: Sequence[Sequence[int]]) -> list[float]:
        """Summed negative log-likelihood (nats) of one reference a prompt; an empty one has likelihood 1.

        Args:
            inputs: from `inputs`.
            references: token ids from `encode_answer`.
        """
        width = max(len(tokens) for tokens in references)
        if not width:
            return [0.0] * len(references)
        fill = min(self.ends, default=self.pad)
        targets = torch.tensor([[*row, *[fill] * (width - len(row))] for row in references], device=self.model.device)
        said = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=width,
            pad_token_id=self.pad,
            logits_processor=LogitsProcessorList([_Dictated(targets)]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        scores = torch.stack(said.logits, 1).float().log_softmax(-1)
        chosen = scores.gather(-1, targets[:, : scores.shape[1], None]).squeeze(-1)
        lengths = torch.tensor([[len(row)] for row in references], device=chosen.device)
        counted = torch.arange(chosen.shape[1], device=chosen.device) < lengths
        return (-chosen.double().masked_fill(~counted, 0.0).sum(1)).tolist()


class _Dictated(LogitsProcessor):
    """Leaves `generate` no choice but the next of the given tokens ``[batch, tokens]``."""

    def __init__(self, targets: Tensor) -> None:
        self._targets, self._step = targets, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._targets[:, self._step, None]
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def run_processed(
    model: ProcessedModel,
    queries: Sequence[Query],
    *,
    decoding: Decoding | None,
    batch_size: int,
    progress: Progress | None = None,
    sharing: Sharing | None = None,
) -> tuple[list[Reply], Effort]:
    """One reply a query, in order, and what they cost; arguments and errors as of `run_queries`, a batch a chunk."""
    texts = [model.lay_out(query.prompt or "") for query in queries]
    order = sorted(range(len(queries)), key=lambda number: len(texts[number]))
    chunks = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    def answer(members: list[int], effort: Effort) -> list[Reply]:
        asked, said = [queries[i] for i in members], [texts[i] for i in members]
        replies = [Reply() for _ in members]
        effort.seconds.setdefault("prompt", 0.0)  # read by `generate`
        with effort.stage("pixels"):
            inputs = model.inputs([query.image for query in asked], said)
        with effort.stage("nll"):
            _add_likelihoods(model, inputs, asked, said, replies)
        if decoding is not None:
            with effort.stage("generate"):
                answers, tokens = model.generate(inputs, decoding)
            effort.tokens += tokens
            for reply, text in zip(replies, answers, strict=True):
                reply.text = text
        return replies

    return answer_chunks(len(queries), chunks, answer, sharing or Sharing(progress=progress))


def _add_likelihoods(
    model: ProcessedModel,
    inputs: dict[str, Any],
    queries: Sequence[Query],
    texts: Sequence[str],
    replies: Sequence[Reply],
) -> None:
    """Adds the likelihood of every reference of `queries` to their `replies`."""
    references = [
        [model.encode_answer(text, answer) for answer in query.references]
        for query, text in zip(queries, texts, strict=True)
    ]
    if not all(tokens for answers in references for tokens in answers):
        raise DataError("a reference text has no tokens: its likelihood says nothing")
    for turn in range(max((len(answers) for answers in references), default=0)):
        chosen = [answers[turn] if turn < len(answers) else [] for answers in references]
        for reply, tokens, nll in zip(replies, chosen, model.reference_nll(inputs, chosen), strict=True):
            if tokens:
                reply.nll = nll + (reply.nll or 0.0)
                reply.nll_tokens += len(tokens)


@contextmanager
def _padded_left(tokenizer: Any) -> Iterator[None]:
    """`tokenizer` padding on the left, and with something to pad with; as it was afterwards."""
    before = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = before


def _pad_right(made: Any, ids: str, mask: str) -> None:
    """Puts the padding of `ids` behind the text: a Q-Former counts positions from the front, pads included, while some
    processors hand its tokenizer the side that the language model's pads on.
    """
    order = made[mask].eq(0).long().argsort(dim=1, stable=True)
    made[ids], made[mask] = made[ids].gather(1, order), made[mask].gather(1, order)


def _generation_config(model: Any) -> Any:
    """Of what generates: the language model where it is one by itself, as in InstructBLIP, else the whole."""
    language = getattr(getattr(model, "language_model", None), "generation_config", None)
    return model.generation_config if language is None else language
