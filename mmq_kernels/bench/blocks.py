"""Whole transformer blocks of BLIP-2, every linear packed, against the same blocks dense: what is left of the kernels'
speed between norms, attention and activations.

One layer of ViT-g, of the Q-Former (with cross-attention) and of OPT-2.7b, built by transformers from its config
classes with random weights. Linears are rounded to nearest: how long they take does not depend on what they hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2QFormerModel, Blip2VisionModel, OPTModel

from mmq_kernels.bench.layers import held_bytes, replace_linears, rounded, twin
from mmq_kernels.bench.models import OPT, QFORMER, QUERIES, VIT_G, Depth, blip2_config, random_model
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.shapes import PATCHES
from mmq_kernels.bench.timing import Rotation
from mmq_kernels.spec import QuantSpec

PROMPT = 32
"""Tokens of text that the language model reads at once, beside the one at a time of decoding."""


@dataclass(frozen=True)
class Block:
    """One layer and what it is called with.

    Attributes:
        layer: dense.
        columns: width of its input x ``[1, m, columns]``.
        tokens: the m to measure.
        arguments: x -> keyword arguments of a call.
    """

    layer: nn.Module
    columns: int
    tokens: tuple[int, ...]
    arguments: Callable[[Tensor], dict[str, Any]]


def _vision(config: Any, setting: Setting) -> Block:
    model = random_model(Blip2VisionModel, config.vision_config, setting.device, setting.dtype)
    return Block(model.encoder, config.vision_config.hidden_size, (PATCHES,), lambda x: {"inputs_embeds": x})


def _qformer(config: Any, setting: Setting) -> Block:
    model = random_model(Blip2QFormerModel, config.qformer_config, setting.device, setting.dtype)
    image = _noise(setting, PATCHES, config.vision_config.hidden_size)
    return Block(
        model.encoder,
        config.qformer_config.hidden_size,
        (QUERIES,),
        lambda x: {"hidden_states": x, "encoder_hidden_states": image, "query_length": QUERIES},
    )


def _language(config: Any, setting: Setting) -> Block:
    model = random_model(OPTModel, config.text_config, setting.device, setting.dtype)
    return Block(model.decoder.layers[0], config.text_config.hidden_size, (1, PROMPT), lambda x: {"hidden_states": x})


BLOCKS: dict[str, Callable[[Any, Setting], Block]] = {
    "vision": _vision,
    "qformer": _qformer,
    "language": _language,
}


def single_layers(quick: bool = False) -> Blip2Config:
    """BLIP-2 with one layer a part and hardly a vocabulary; with heads of the published number, or two of them."""
    vision, qformer, language = (Depth(1, 2 if quick else part.heads) for part in (VIT_G, QFORMER, OPT))
    return blip2_config(vision, qformer, language, vocabulary=64)


def bench_blocks(
    setting: Setting, bits: Sequence[int], *, group: int = 128, config: Blip2Config | None = None
) -> Iterator[Row]:
    """A row for each block, width and number of tokens.

    Args:
        group: weights that share a scale.
        config: of the model that the first layers are taken from; default the published sizes.
    """
    config = config or single_layers(setting.quick)
    for name, build in BLOCKS.items():
        block = build(config, setting)
        dense = _copies(setting, block.layer)
        for width in bits:
            packed = _packed_copies(setting, block.layer, QuantSpec(width, group))
            for m in block.tokens:
                row = {"bench": "block", "block": name, "bits": width, "group": group, "m": m}
                yield row | _measured(setting, block, packed, dense, m)


def _measured(setting: Setting, block: Block, packed: list[nn.Module], dense: list[nn.Module], m: int) -> Row:
    x = _noise(setting, m, block.columns)
    baseline = f"torch_{setting.dtype_name}"
    arguments = block.arguments(x)
    took = setting.timed({"packed": _calls(packed, arguments), baseline: _calls(dense, arguments)})
    return {
        "dtype": setting.dtype_name,
        **took["packed"],
        f"{baseline}_us": took[baseline]["us"],
        f"x_{baseline}": took[baseline]["us"] / took["packed"]["us"],
        "held_bytes": held_bytes(packed[0]),
        "torch_held_bytes": held_bytes(dense[0]),
    }


def _copies(setting: Setting, layer: nn.Module) -> list[nn.Module]:
    return [layer] + [copy.deepcopy(layer) for _ in range(setting.copies(held_bytes(layer)) - 1)]


def _packed_copies(setting: Setting, layer: nn.Module, spec: QuantSpec) -> list[nn.Module]:
    """The layer quantized once, and copies of it that share nothing."""
    first = copy.deepcopy(layer)
    replace_linears(first, lambda _, linear: rounded(linear, spec))
    copies = [first]
    for _ in range(setting.copies(held_bytes(first)) - 1):
        other = copy.deepcopy(layer)
        replace_linears(other, lambda name, _: twin(first.get_submodule(name)))  # type: ignore[arg-type]
        copies.append(other)
    return copies


def _calls(layers: list[nn.Module], arguments: dict[str, Any]) -> Rotation:
    return Rotation([lambda layer=layer: layer(**arguments) for layer in layers])  # type: ignore[misc]


def _noise(setting: Setting, m: int, columns: int) -> Tensor:
    return torch.randn(1, m, columns, device=setting.device).to(setting.dtype)
