"""Greedy decoding of a whole BLIP-2, packed against dense: tokens per second, and the memory that is held.

Random weights say nothing worth reading, and take as long to say it: the end token is put off until all tokens are
made. The prompt is one image. Calls are eager, as `generate` makes them, so the host's share is in the figures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from mmq_kernels.bench.layers import held_bytes, replace_linears, rounded
from mmq_kernels.bench.models import Depth, blip2_config, random_model
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.timing import timed
from mmq_kernels.spec import QuantSpec

NEW_TOKENS = 32

LEFT_ALONE = ("lm_head",)
"""The head is tied to the embedding and stays dense, as in every recipe that does not name it."""


def bench_decode(
    setting: Setting,
    bits: Sequence[int],
    *,
    group: int = 128,
    config: Blip2Config | None = None,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 3,
) -> Iterator[Row]:
    """A row for each width.

    Args:
        group: weights that share a scale.
        config: of the model; default the published sizes, or with `setting.quick` two small layers a part.
        new_tokens: tokens to make, batch 1.
        rounds: how often each model is timed, in turns; at least 2.
    """
    if config is None:
        small = Depth(2, 2)
        config = blip2_config(small, small, small, 1024) if setting.quick else blip2_config()
    dense = random_model(Blip2ForConditionalGeneration, config, setting.device, setting.dtype)
    inputs = _inputs(config, setting)
    for width in bits:
        packed = copy.deepcopy(dense)
        spec = QuantSpec(width, group)
        layers = replace_linears(packed, lambda _, linear, spec=spec: rounded(linear, spec), left_alone=LEFT_ALONE)  # type: ignore[misc]
        models = {"packed": packed, "torch": dense}
        took = timed(
            {name: lambda _, model=model: _generate(model, inputs, new_tokens) for name, model in models.items()},  # type: ignore[misc]
            0,
            setting.device,
            least=rounds,
            graph=False,
            clock=setting.clock,
        )
        rates = {name: new_tokens / figures["us"] * 1e6 for name, figures in took.items()}
        yield {
            "bench": "decode",
            "bits": width,
            "group": group,
            "layers": layers,
            "left_alone": list(LEFT_ALONE),
            "dtype": setting.dtype_name,
            "new_tokens": new_tokens,
            **took["packed"],
            f"torch_{setting.dtype_name}_us": took["torch"]["us"],
            f"x_torch_{setting.dtype_name}": took["torch"]["us"] / took["packed"]["us"],
            "tokens_per_second": rates["packed"],
            "torch_tokens_per_second": rates["torch"],
            "held_bytes": held_bytes(packed),
            "torch_held_bytes": held_bytes(dense),
        }
        del packed, models


def _inputs(config: Any, setting: Setting) -> dict[str, Any]:
    """One image of noise, and a prompt of its queries and the start token."""
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, device=setting.device)
    queries = [config.image_token_index] * config.num_query_tokens
    ids = torch.tensor([[*queries, config.text_config.bos_token_id]], device=setting.device)
    return {"pixel_values": pixels.to(setting.dtype), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _generate(model: Any, inputs: dict[str, Any], new_tokens: int) -> Any:
    return model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
