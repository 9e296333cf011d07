"""BLIP-2 with ViT-g and OPT-2.7b as published, or less of it, with random weights: sizes and speed need no download."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Blip2Config

from mmq_kernels.nn import parameters_on_meta

QUERIES = 32
"""Tokens that the Q-Former makes of an image."""

VOCABULARY = 50304

IMAGE_TOKEN = 50265
"""The id that stands where the tokens of an image go; the last id of a smaller vocabulary."""


class Depth(NamedTuple):
    """How many layers a part has, and how many heads a layer; its widths follow from its heads."""

    layers: int
    heads: int


VIT_G, QFORMER, OPT = Depth(39, 16), Depth(12, 12), Depth(32, 32)


def blip2_config(
    vision: Depth = VIT_G,
    qformer: Depth = QFORMER,
    language: Depth = OPT,
    vocabulary: int = VOCABULARY,
) -> Blip2Config:
    """The architecture; every default is the published one.

    A head of the ViT is 88 columns wide and brings 384 columns of MLP with it; 64 and 256 in the Q-Former, 80 and 320
    in OPT.
    """
    vision_config = {
        "hidden_size": 88 * vision.heads,
        "intermediate_size": 384 * vision.heads,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "image_size": 224,
        "patch_size": 14,
        "qkv_bias": True,
    }
    qformer_config = {
        "vocab_size": 30522,
        "hidden_size": 64 * qformer.heads,
        "num_hidden_layers": qformer.layers,
        "num_attention_heads": qformer.heads,
        "intermediate_size": 256 * qformer.heads,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": 88 * vision.heads,
    }
    text_config = {
        "model_type": "opt",
        "vocab_size": vocabulary,
        "hidden_size": 80 * language.heads,
        "ffn_dim": 320 * language.heads,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "word_embed_proj_dim": 80 * language.heads,
        "max_position_embeddings": 2048,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": min(50118, vocabulary - 2),
    }
    return Blip2Config(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=text_config,
        num_query_tokens=QUERIES,
        image_token_index=min(IMAGE_TOKEN, vocabulary - 1),
    )


def random_model(model_class: type[nn.Module], config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A transformers model with random weights, made on `device` in `dtype`, ready to run.

    Weights are small, those of norms around 1; what is tied stays tied.
    """
    with parameters_on_meta():
        model: Any = model_class(config)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            values = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02)
            if name.endswith("weight") and values.dim() == 1:
                values += 1
            made[id(parameter)] = nn.Parameter(values, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[id(parameter)])
    return model.to(device).eval()
