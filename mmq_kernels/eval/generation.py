"""Batched generation with the prompts and decoding settings of a protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmq_kernels.eval.prompted import PromptBatch, PromptedModel
from mmq_kernels.eval.protocol import Decoding


@torch.inference_mode()
def generate(
    model: PromptedModel, prompts: Sequence[Sequence[int]], features: Tensor, decoding: Decoding
) -> tuple[list[str], int]:
    """Answers to `prompts`, and how many tokens they took (end tokens included).

    Args:
        prompts: token ids from `PromptedModel.encode`.
        features: ``[len(prompts), image_tokens, hidden]`` from `PromptedModel.image_features`.
        decoding: greedy or beam search, and its lengths.

    Raises:
        ModelMismatch: a prompt without the image tokens that the model expects.
    """
    batch = model.batch(prompts, features)
    inputs = {"inputs_embeds": batch.embeddings, "attention_mask": batch.attention_mask}
    if not model.encoder_decoder:
        inputs["input_ids"] = batch.input_ids
    output = model.language.generate(**inputs, pad_token_id=model.pad, **decoding.arguments())
    rows = [_until_end(row, model.ends) for row in _new_tokens(output, batch, model.encoder_decoder).tolist()]
    texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [text.strip() for text in texts], sum(len(row) for row in rows)


def _new_tokens(output: Tensor, batch: PromptBatch, encoder_decoder: bool) -> Tensor:
    """`output` without the echoed prompt, which transformers returns in some versions and not in others."""
    if encoder_decoder:
        return output[:, 1:]  # the decoder's start token
    width = batch.input_ids.shape[1]
    echoed = output.shape[1] >= width and torch.equal(output[:, :width], batch.input_ids)
    return output[:, width:] if echoed else output


def _until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    """`row` up to and with its first end token: what follows is padding."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: stop + 1]
