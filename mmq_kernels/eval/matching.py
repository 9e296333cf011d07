"""Models that find texts for images: `Blip2ForImageTextRetrieval` opened at its seams, so that a gallery costs
images + texts, not images x texts; and dual encoders (CLIP, SigLIP), which embed and no more.

The pieces and their order are those of the models' own `forward`; tests hold them equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmq_kernels.eval.errors import ModelMismatch
from mmq_kernels.eval.protocol import clean_caption

MAX_TEXT_TOKENS = 35
_PARTS = (
    "vision_model",
    "qformer",
    "query_tokens",
    "embeddings",
    "vision_projection",
    "text_projection",
    "itm_head",
)


class MatchingModel:
    """`model` with the processor that belongs to it: embeds, and matches pairs.

    Args:
        model: a `Blip2ForImageTextRetrieval`, quantized or not.
        processor: its processor, of which the tokenizer is used.

    Raises:
        ModelMismatch: the model has no retrieval heads.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        missing = [part for part in _PARTS if not hasattr(model, part)]
        if missing:
            raise ModelMismatch(
                f"task retrieval needs an image-text-retrieval model with {missing[0]}, {type(model).__name__} has none"
            )
        self.model = model
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.queries = int(model.query_tokens.shape[1])
        pad = self.tokenizer.pad_token_id
        self.pad = 0 if pad is None else pad

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a caption, cleaned as in training, at most `MAX_TEXT_TOKENS`."""
        return list(self.tokenizer(clean_caption(text), truncation=True, max_length=MAX_TEXT_TOKENS)["input_ids"])

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Vision features ``[images, patches, width]``, and unit embeddings ``[images, queries, dim]``."""
        model = self.model
        vision = model.vision_model(pixel_values=pixels.to(model.device), return_dict=True).last_hidden_state
        outputs = model.qformer(
            query_embeds=model.query_tokens.expand(len(vision), -1, -1),
            encoder_hidden_states=vision,
            encoder_attention_mask=torch.ones(vision.shape[:-1], dtype=torch.long, device=vision.device),
            return_dict=True,
        ).last_hidden_state
        projected = model.vision_projection(outputs.to(model.vision_projection.weight.dtype))
        return vision, normalize(projected, dim=-1)

    @torch.inference_mode()
    def embed_texts(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Unit embeddings ``[texts, dim]`` of token rows from `encode_text`."""
        ids, mask = self._padded(rows)
        model = self.model
        outputs = model.qformer(
            query_embeds=model.embeddings(input_ids=ids),
            query_length=0,
            attention_mask=mask,
            return_dict=True,
        ).last_hidden_state[:, 0]
        return normalize(model.text_projection(outputs.to(model.text_projection.weight.dtype)), dim=-1)

    @torch.inference_mode()
    def match(self, vision: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits ``[texts]`` that each text belongs to one image.

        The image's keys and values are computed once for all texts: its batch of one is broadcast.

        Args:
            vision: ``[1, patches, width]`` from `embed_images`.
            rows: token rows from `encode_text`.
        """
        ids, mask = self._padded(rows)
        model = self.model
        queries = model.query_tokens.expand(len(rows), -1, -1)
        outputs = model.qformer(
            query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
            query_length=self.queries,
            attention_mask=torch.cat([mask.new_ones(len(rows), self.queries), mask], dim=1),
            encoder_hidden_states=vision,
            return_dict=True,
        ).last_hidden_state[:, : self.queries]
        return model.itm_head(outputs.to(model.itm_head.weight.dtype)).mean(1)[:, 1]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return _padded(rows, self.pad, self.model.device)


class DualEncoder:
    """A dual encoder with the processor that belongs to it: embeds images and texts, matches no pairs.

    Args:
        model: a transformers model with `get_image_features` and `get_text_features`, quantized or not.
        processor: its processor, of which the tokenizer is used.

    Raises:
        ModelMismatch: the model has no such features, or takes images of no fixed size.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        kind = model.config.model_type
        if not hasattr(model, "get_text_features") or "spatial_shapes" in inspect.signature(model.forward).parameters:
            raise ModelMismatch(
                f"task retrieval needs an image-text-retrieval model or a dual encoder with images of one size, "
                f"{type(model).__name__} is neither"
            )
        self.model = model
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self.fixed = kind.startswith("siglip")  # trained on texts of full length, padding read like words
        pad = self.tokenizer.pad_token_id
        self.pad = 0 if pad is None else pad

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a caption as it is, no more than the model has positions for."""
        how = {"padding": "max_length"} if self.fixed else {}
        return list(self.tokenizer(text, truncation=True, max_length=self.max_tokens, **how)["input_ids"])

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings ``[images, 1, dim]``, twice, where `MatchingModel` gives vision features first."""
        model = self.model
        embedded = _tensor(model.get_image_features(pixel_values=pixels.to(model.device, model.dtype)))
        unit = normalize(embedded, dim=-1)[:, None]
        return unit, unit

    @torch.inference_mode()
    def embed_texts(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Unit embeddings ``[texts, dim]`` of token rows from `encode_text`."""
        ids, mask = _padded(rows, self.pad, self.model.device)
        known = {} if self.fixed else {"attention_mask": mask}
        return normalize(_tensor(self.model.get_text_features(input_ids=ids, **known)), dim=-1)


RetrievalModel = MatchingModel | DualEncoder


def retrieval_model(model: Any, processor: Any) -> RetrievalModel:
    """What ranks a gallery with `model`.

    Raises:
        ModelMismatch: the model does not find texts for images.
    """
    return DualEncoder(model, processor) if hasattr(model, "logit_scale") else MatchingModel(model, processor)


def _tensor(features: Any) -> Tensor:
    """Embeddings, which transformers 5 hands over inside an output and 4 by themselves."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[texts, tokens]``, right-padded."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    return ids.to(device), mask.long().to(device)
