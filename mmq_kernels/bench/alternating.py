"""Whether torch's products and the packed ones get into each other's way: alternating calls against each alone.

Both run on torch's own pool of threads, so there should be nothing to pay. `overhead` is the share that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from mmq_kernels.bench.gemm import copies
from mmq_kernels.bench.layers import random_layer
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.timing import Rotation
from mmq_kernels.spec import QuantSpec


def bench_alternating(setting: Setting, *, size: int = 2048, m: int = 16, bits: int = 4) -> Iterator[Row]:
    """One row: microseconds of a torch linear alone, of a packed one alone, and of the two in turn."""
    spec, x = QuantSpec(bits, 128), torch.randn(m, size).to(setting.dtype)
    layers = copies(setting, random_layer(size, size, spec, setting.device, setting.dtype))
    weights = [torch.randn(size, size).to(setting.dtype) for _ in range(setting.copies(size * size * x.itemsize))]
    packed = Rotation([lambda layer=layer: layer(x) for layer in layers])  # type: ignore[misc]
    dense = Rotation([lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights])  # type: ignore[misc]

    def both(repetition: int) -> None:
        dense(repetition)
        packed(repetition)

    pairs = Rotation([partial(both, repetition) for repetition in range(max(len(dense), len(packed)))])
    took = setting.timed({"torch": dense, "packed": packed, "both": pairs})
    torch_us, packed_us = took["torch"]["us"], took["packed"]["us"]
    yield {
        "bench": "alternating",
        "bits": bits,
        "group": 128,
        "m": m,
        "n": size,
        "k": size,
        "dtype": setting.dtype_name,
        **took["both"],
        "torch_us": torch_us,
        "packed_us": packed_us,
        "overhead": took["both"]["us"] / (torch_us + packed_us) - 1,
    }
