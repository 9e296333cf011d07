"""Whether torch's products and the packed ones get into each other's way: alternating calls against each alone.

Both run on torch's own pool of threads, so there should be nothing to pay. `overhead` is the share that is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from mmq_kernels.bench.gemm import copies
from mmq_kernels.bench.layers import random_layer
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.timing import Rotation
from mmq_kernels.spec import QuantSpec


def bench_alternating(
    setting: Setting, *, size: int = 2048, m: int = 16, bits: int = 4, rounds: int = 5
) -> Iterator[Row]:
    """One row: microseconds of a torch linear alone, of a packed one alone, and of the two in turn.

    Args:
        rounds: how often the three are measured, each by itself, for `setting.seconds / rounds`; medians count.
    """
    spec, x = QuantSpec(bits, 128), torch.randn(m, size).to(setting.dtype)
    layers = copies(setting, random_layer(size, size, spec, setting.device, setting.dtype))
    weights = [torch.randn(size, size).to(setting.dtype) for _ in range(setting.copies(size * size * x.itemsize))]
    packed = Rotation([lambda layer=layer: layer(x) for layer in layers])  # type: ignore[misc]
    dense = Rotation([lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights])  # type: ignore[misc]

    def both(repetition: int) -> None:
        dense(repetition)
        packed(repetition)

    found: dict[str, list[float]] = {"torch": [], "packed": [], "both": []}
    for _ in range(rounds):
        for name, call in (("torch", dense), ("packed", packed), ("both", both)):
            found[name].append(setting.timed({name: call})[name]["us"])
    us = {name: statistics.median(values) for name, values in found.items()}
    yield {
        "bench": "alternating",
        "bits": bits,
        "group": 128,
        "m": m,
        "n": size,
        "k": size,
        "dtype": setting.dtype_name,
        "us": us["both"],
        "us_q1": min(found["both"]),
        "us_q3": max(found["both"]),
        "torch_us": us["torch"],
        "packed_us": us["packed"],
        "overhead": us["both"] / (us["torch"] + us["packed"]) - 1,
    }
