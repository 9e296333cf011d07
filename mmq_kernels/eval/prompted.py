"""A generative BLIP-2 opened at its seams: features once per image, then any number of prompts about it.

The pieces and their order are those of `Blip2ForConditionalGeneration.generate`; a test holds the two equal.
Sequences are ``[pads] [image tokens] [prompt]``: padding stands left of everything, so that no distance
between image tokens and text depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmq_kernels.eval.errors import ModelMismatch

_PARTS = ("vision_model", "qformer", "query_tokens", "language_projection", "language_model")


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts with their image features put in.

    Attributes:
        input_ids, attention_mask: int64 ``[batch, tokens]``.
        embeddings: ``[batch, tokens, hidden]`` in the language model's dtype.
    """

    input_ids: Tensor
    attention_mask: Tensor
    embeddings: Tensor


class PromptedModel:
    """`model` with the processor that belongs to it.

    Args:
        model: a `Blip2ForConditionalGeneration`, quantized or not.
        processor: its processor; the tokenizer is used, and its number of image tokens checked.

    Raises:
        ModelMismatch: the model cannot generate, or model and processor disagree about image tokens.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        missing = [part for part in _PARTS if not hasattr(model, part)]
        if missing:
            raise ModelMismatch(f"a generative task needs a model with {missing[0]}, {type(model).__name__} has none")
        self.model = model
        self.language = model.language_model
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.encoder_decoder = bool(self.language.config.is_encoder_decoder)
        self.image_token, self.image_tokens = _image_tokens(model.config, processor, self.tokenizer)
        self.pad = _first(self.tokenizer.pad_token_id, self.language.config.pad_token_id, 0)
        ends = _first(self.language.generation_config.eos_token_id, self.tokenizer.eos_token_id, [])
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def image_features(self, pixels: Tensor) -> Tensor:
        """What the language model sees of each image: ``[images, image_tokens, hidden]``.

        Args:
            pixels: ``[images, channels, height, width]``.
        """
        model = self.model
        vision = model.vision_model(pixels.to(model.device), return_dict=True).last_hidden_state
        queries = model.qformer(
            query_embeds=model.query_tokens.expand(len(vision), -1, -1),
            encoder_hidden_states=vision,
            encoder_attention_mask=torch.ones(vision.shape[:-1], dtype=torch.long, device=vision.device),
            return_dict=True,
        ).last_hidden_state
        return model.language_projection(queries.to(vision.dtype))

    def encode(self, text: str | None) -> list[int]:
        """Image tokens, then the tokens of `text`, or the start token where there is no text.

        Raises:
            ModelMismatch: no text, and no start token either.
        """
        if text is not None:
            tokens = list(self.tokenizer(text)["input_ids"])
        else:
            start = getattr(self.model.config.text_config, "bos_token_id", None)
            tokens = [] if start is None else [start]
        if not tokens and not self.encoder_decoder:
            raise ModelMismatch("the language model has no start token to begin a text with")
        return [self.image_token] * self.image_tokens + tokens

    def encode_answer(self, text: str, *, after_prompt: bool) -> list[int]:
        """Tokens of a reference `text`; after a prompt it begins with a space, as generated text does."""
        spaced = f" {text}" if after_prompt and not self.encoder_decoder else text
        return list(self.tokenizer(spaced, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def batch(self, rows: Sequence[Sequence[int]], features: Tensor) -> PromptBatch:
        """`rows` left-padded, the features of each row's image in the place of its image tokens.

        Args:
            rows: token ids from `encode`, possibly with more text behind.
            features: ``[len(rows), image_tokens, hidden]``.

        Raises:
            ModelMismatch: a row does not hold exactly the image tokens that the model expects.
        """
        width = max(len(row) for row in rows)
        ids = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in rows])
        lengths = torch.tensor([[len(row)] for row in rows])
        mask = (torch.arange(width) >= width - lengths).long()
        is_image = (ids == self.image_token) & mask.bool()
        counts = is_image.sum(1)
        if not bool((counts == self.image_tokens).all()):
            raise ModelMismatch(
                f"a prompt holds {int(counts.min())} image tokens where the model expects "
                f"{self.image_tokens}: the image would be ignored"
            )
        ids, mask, is_image = (tensor.to(features.device) for tensor in (ids, mask, is_image))
        embeddings = self.language.get_input_embeddings()(ids)
        features = features.to(embeddings.dtype)
        return PromptBatch(ids, mask, embeddings.masked_scatter(is_image.unsqueeze(-1), features))


def _image_tokens(config: Any, processor: Any, tokenizer: Any) -> tuple[int, int]:
    """Id and number of the image tokens, agreed upon by model, processor and tokenizer."""
    token, count = getattr(config, "image_token_index", None), config.num_query_tokens
    if token is None:
        raise ModelMismatch("the model's config has no image_token_index: it cannot place the image in a prompt")
    named = getattr(processor, "image_token", None)
    if named is not None:
        known = tokenizer.convert_tokens_to_ids(str(getattr(named, "content", named)))
        if known != token:
            raise ModelMismatch(f"the image token is {known} in the tokenizer, {token} in the model's config")
    promised = getattr(processor, "num_query_tokens", None)
    if promised is not None and promised != count:
        raise ModelMismatch(f"the processor writes {promised} image tokens, the model expects {count}")
    return token, count


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
