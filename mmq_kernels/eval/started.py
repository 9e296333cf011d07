"""Prompts that a language model has read once, to be answered and to be continued with references.

The costly part of a short answer is reading its prompt. It is read once here: likelihoods of references and
every beam of a search go on from the same state (the key-value cache, or the encoder's output).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from mmq_kernels.eval.prompted import PromptBatch, PromptedModel
from mmq_kernels.eval.protocol import Decoding

_NAMES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"
"""What this transformers calls the key-value cache, of models and of what they put out."""


class Forced(NamedTuple):
    """Logits of teacher-forced references.

    Attributes:
        logits: ``[batch, tokens, vocabulary]``, each before its target.
        targets: int64 ``[batch, tokens]``, right-padded.
        counted: bool ``[batch, tokens]``, False on padding.
    """

    logits: Tensor
    targets: Tensor
    counted: Tensor


class StartedDecoder:
    """Prompts of a decoder-only model, all but their last token in the cache."""

    @torch.inference_mode()
    def __init__(self, model: PromptedModel, batch: PromptBatch) -> None:
        self._model, self._batch = model, batch
        output = model.language(
            inputs_embeds=batch.embeddings[:, :-1],
            attention_mask=batch.attention_mask[:, :-1],
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache: DynamicCache = output[CACHE]

    @torch.inference_mode()
    def force(self, references: Sequence[Sequence[int]]) -> Forced:
        """Logits of one reference a prompt; may be called again with others."""
        targets, counted = _padded(references, self._model.pad, self._batch.input_ids.device)
        fed = torch.cat([self._batch.input_ids[:, -1:], targets[:, :-1]], dim=1)
        mask = torch.cat([self._batch.attention_mask, counted[:, :-1].long()], dim=1)
        output = self._model.language(input_ids=fed, attention_mask=mask, use_cache=True, **{CACHE: self._cache})
        self._cache = output[CACHE]
        self._cache.crop(-fed.shape[1])
        return Forced(output.logits, targets, counted)

    @torch.inference_mode()
    def generate(self, decoding: Decoding) -> Tensor:
        """New tokens ``[batch, tokens]``, without the prompt. Ends the use of this object."""
        if decoding.num_beams > 1:
            self._cache.batch_repeat_interleave(decoding.num_beams)
        prompt = self._batch.input_ids
        output = self._model.language.generate(
            input_ids=prompt,
            attention_mask=self._batch.attention_mask,
            pad_token_id=self._model.pad,
            **{CACHE: self._cache},
            **decoding.arguments(),
        )
        # some versions of transformers echo the prompt, others do not
        width = prompt.shape[1]
        echoed = output.shape[1] >= width and torch.equal(output[:, :width], prompt)
        return output[:, width:] if echoed else output


class StartedEncoderDecoder:
    """Prompts of an encoder-decoder model, encoded."""

    @torch.inference_mode()
    def __init__(self, model: PromptedModel, batch: PromptBatch) -> None:
        self._model, self._mask = model, batch.attention_mask
        self._encoded: Any = model.language.get_encoder()(
            inputs_embeds=batch.embeddings, attention_mask=batch.attention_mask, return_dict=True
        )

    @torch.inference_mode()
    def force(self, references: Sequence[Sequence[int]]) -> Forced:
        """Logits of one reference a prompt; may be called again with others."""
        targets, counted = _padded(references, self._model.pad, self._mask.device)
        start = torch.full_like(targets[:, :1], self._model.language.config.decoder_start_token_id)
        logits = self._model.language(
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            decoder_input_ids=torch.cat([start, targets[:, :-1]], dim=1),
            use_cache=False,
        ).logits
        return Forced(logits, targets, counted)

    @torch.inference_mode()
    def generate(self, decoding: Decoding) -> Tensor:
        """New tokens ``[batch, tokens]``, without the decoder's start token."""
        output = self._model.language.generate(
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            pad_token_id=self._model.pad,
            **decoding.arguments(),
        )
        return output[:, 1:]


Started = StartedDecoder | StartedEncoderDecoder


def start(model: PromptedModel, prompts: Sequence[Sequence[int]], features: Tensor) -> Started:
    """Lets `model` read `prompts`.

    Args:
        prompts: token ids from `PromptedModel.encode`.
        features: ``[len(prompts), image_tokens, hidden]`` from `PromptedModel.image_features`.

    Raises:
        ModelMismatch: a prompt without the image tokens that the model expects.
    """
    batch = model.batch(prompts, features)
    return StartedEncoderDecoder(model, batch) if model.encoder_decoder else StartedDecoder(model, batch)


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids, and which of them are no padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    counted = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    return ids.to(device), counted.to(device)
