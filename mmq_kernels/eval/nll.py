"""Teacher-forced negative log-likelihood of reference texts: the steadiest signal of what quantization cost.

``nll = -sum_t log p(reference_t | image, prompt, reference_<t) / tokens``, over reference tokens only: pads,
image tokens, prompt and the end token do not count.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.prompted import PromptedModel


@torch.inference_mode()
def reference_nll(
    model: PromptedModel,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    features: Tensor,
) -> list[float]:
    """Summed negative log-likelihood (nats) of each reference after its prompt.

    Args:
        prompts: token ids from `PromptedModel.encode`.
        references: token ids from `PromptedModel.encode_answer`, at least one each.
        features: ``[len(prompts), image_tokens, hidden]``.

    Raises:
        DataError: an empty reference.
    """
    if not all(references):
        raise DataError("a reference text has no tokens: its likelihood says nothing")
    log_likelihood = _encoder_decoder if model.encoder_decoder else _decoder_only
    return (-log_likelihood(model, prompts, references, features)).tolist()


def _decoder_only(
    model: PromptedModel,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    features: Tensor,
) -> Tensor:
    """Prompt and reference in one left-padded row, so every reference ends at the right edge."""
    rows = [[*prompt, *reference] for prompt, reference in zip(prompts, references, strict=True)]
    batch = model.batch(rows, features)
    longest = max(len(reference) for reference in references)
    keep = longest + 1
    forward = model.language.forward
    shorten = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    logits = model.language(
        inputs_embeds=batch.embeddings, attention_mask=batch.attention_mask, use_cache=False, **shorten
    ).logits[:, -keep:-1]
    lengths = torch.tensor([[len(reference)] for reference in references], device=logits.device)
    counted = torch.arange(longest, device=logits.device) >= longest - lengths
    return _summed(logits, batch.input_ids[:, -longest:], counted)


def _encoder_decoder(
    model: PromptedModel,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    features: Tensor,
) -> Tensor:
    """Prompt to the encoder, reference to the decoder behind its start token."""
    batch = model.batch(prompts, features)
    device, longest = features.device, max(len(reference) for reference in references)
    targets = torch.tensor([[*row, *[model.pad] * (longest - len(row))] for row in references], device=device)
    start = torch.full_like(targets[:, :1], model.language.config.decoder_start_token_id)
    logits = model.language(
        inputs_embeds=batch.embeddings,
        attention_mask=batch.attention_mask,
        decoder_input_ids=torch.cat([start, targets[:, :-1]], dim=1),
        use_cache=False,
    ).logits
    lengths = torch.tensor([[len(reference)] for reference in references], device=device)
    return _summed(logits, targets, torch.arange(longest, device=device) < lengths)


def _summed(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Sum of the counted targets' log-probabilities, float64 ``[batch]``."""
    scores = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return scores.double().masked_fill(~counted, 0.0).sum(1)
