"""The linears of the models that this package is for, by name, and the tokens and groups they are measured with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Shape(NamedTuple):
    """A linear layer ``W [n, k]``: n out_features, k in_features."""

    name: str
    n: int
    k: int


SHAPES = {
    shape.name: shape
    for shape in (
        # BLIP-2: ViT-g, Q-Former, OPT-2.7b
        Shape("vit.qkv", 4224, 1408),
        Shape("vit.proj", 1408, 1408),
        Shape("vit.fc1", 6144, 1408),
        Shape("vit.fc2", 1408, 6144),
        Shape("qformer.attention", 768, 768),
        Shape("qformer.fc1", 3072, 768),
        Shape("qformer.fc2", 768, 3072),
        Shape("qformer.cross", 768, 1408),
        Shape("opt.attention", 2560, 2560),
        Shape("opt.fc1", 10240, 2560),
        Shape("opt.fc2", 2560, 10240),
        Shape("opt.lm_head", 50272, 2560),
        # other towers and language models
        Shape("clip.attention", 1024, 1024),
        Shape("clip.fc1", 4096, 1024),
        Shape("clip.fc2", 1024, 4096),
        Shape("vicuna.attention", 4096, 4096),
        Shape("vicuna.gate", 11008, 4096),
        Shape("vicuna.down", 4096, 11008),
        Shape("siglip.fc1", 4304, 1152),
        Shape("siglip.fc2", 1152, 4304),  # 33 groups of 128 and 80 columns left
        Shape("qwen.down", 1280, 3420),  # k is no multiple of 8
        # what kernels are usually compared at
        Shape("square.4096", 4096, 4096),
        Shape("square.8192", 8192, 8192),
    )
}

PATCHES = 257
"""Tokens of ViT-g: 16 x 16 patches of 14 pixels, and one for the image."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, PATCHES, 577, 1024, 4096)
"""Rows of x: decoding, small batches, the patches of one image at 224 and 336 pixels, prompts."""

GROUPS = (-1, 128, 32)
"""Weights that share a scale; -1: a whole row."""


def named(names: Iterable[str]) -> list[Shape]:
    """Shapes by name (`vit.fc1`), by family (`vit`), or by size (`4096x1408`: n x k).

    Raises:
        ValueError: for a name that is none of these.
    """
    found: dict[str, Shape] = {}
    for name in names:
        size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if size:
            found[name] = Shape(name, int(size[1]), int(size[2]))
            continue
        chosen = {key: shape for key, shape in SHAPES.items() if name in (key, key.partition(".")[0])}
        if not chosen:
            families = dict.fromkeys(key.partition(".")[0] for key in SHAPES)
            raise ValueError(
                f"a shape must be NxK, one of {', '.join(families)}, or one of their layers ({', '.join(SHAPES)}), "
                f"got {name!r}"
            )
        found |= chosen
    return list(found.values())
