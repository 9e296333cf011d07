"""`Blip2ForImageTextRetrieval` opened at its seams, so that a gallery costs images + texts, not images x
texts.

The pieces and their order are those of `Blip2ForImageTextRetrieval.forward`; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmq_kernels.eval.errors import ModelMismatch

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
    """`model` with the processor that belongs to it.

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
        """Token ids of a caption, at most `MAX_TEXT_TOKENS`."""
        return list(self.tokenizer(text, truncation=True, max_length=MAX_TEXT_TOKENS)["input_ids"])

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
        """Ids and mask ``[texts, tokens]``, right-padded."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows])
        mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        return ids.to(self.model.device), mask.long().to(self.model.device)
