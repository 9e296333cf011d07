"""Captions per second and memory of a whole BLIP-2 from a folder, packed against fp32 and bf16.

Every model makes the same number of tokens from the same images, whatever it says, so that none is faster for being
brief.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmq_kernels.bench.layers import held_bytes
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import DTYPES, Setting
from mmq_kernels.bench.timing import timed
from mmq_kernels.checkpoint import load, load_processor, quantize_model
from mmq_kernels.nn import set_activation_bits

NEW_TOKENS = 16


def bench_captions(
    setting: Setting, folder: str | Path, bits: Sequence[int], *, group: int = 64, images: int = 32, rounds: int = 5
) -> Iterator[Row]:
    """A row for each width, activations as they are and of 8 bits.

    Args:
        folder: a BLIP-2 that is not quantized.
        group: weights that share a scale, rounded to nearest in every linear.
        images: captioned in one batch.
        rounds: how often each model is timed, in turns; at least 2.
    """
    processor: Any = load_processor(folder)
    shown = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8).numpy() for _ in range(images)]
    pixels = processor(images=shown, return_tensors="pt")["pixel_values"].to(setting.device)
    dense = {name: load(folder, device=setting.device, dtype=DTYPES[name]) for name in setting.baselines}
    for width in bits:
        packed: Any = load(folder, dtype=setting.dtype)
        quantize_model(packed, f"all=rtn:{width}:g{group}")
        packed.to(setting.device)
        ways = [16, 8] if setting.device.type == "cpu" else [16]
        models = {**dense, **{f"a{way}": packed for way in ways}}
        calls = {name: _captions(model, pixels, name) for name, model in models.items()}
        took = timed(calls, 0, setting.device, least=rounds, graph=False, clock=setting.clock)
        for way in ways:
            yield {
                "bench": "captions",
                "bits": width,
                "group": group,
                "activation_bits": way,
                "dtype": setting.dtype_name,
                "images": images,
                "new_tokens": NEW_TOKENS,
                **took[f"a{way}"],
                "captions_per_second": images / took[f"a{way}"]["us"] * 1e6,
                "held_bytes": held_bytes(packed),
                **_beside(dense, took, images, took[f"a{way}"]["us"]),
            }


def _captions(model: Any, pixels: torch.Tensor, name: str) -> Any:
    images, bits = pixels.to(model.dtype), {"a8": 8, "a16": 16}.get(name)

    def call(_: int) -> object:
        if bits is not None:
            set_activation_bits(model, bits)
        return model.generate(pixel_values=images, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)

    return call


def _beside(dense: dict[str, Any], took: dict[str, dict[str, float]], images: int, us: float) -> Row:
    row: Row = {}
    for name, model in dense.items():
        row[f"torch_{name}_captions_per_second"] = images / took[name]["us"] * 1e6
        row[f"torch_{name}_held_bytes"] = held_bytes(model)
        row[f"x_torch_{name}"] = took[name]["us"] / us
    return row
