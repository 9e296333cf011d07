"""Codes to stream words, to the cpu layout, and back; and rounding to nearest: seconds for 1e9 codes.

What a billion codes take at the speed of memory is in the row too: a copy of the codes into fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.backends import PackedWeight, backend
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.timing import timed
from mmq_kernels.spec import QuantSpec

COLUMNS = 8192
GROUP = 128


def bench_packing(setting: Setting, bits: Sequence[int], count: int, *, rounds: int = 3) -> Iterator[Row]:
    """A row for each width.

    Args:
        count: of codes, a multiple of 8192.
        rounds: how often each step is timed, in turns; at least 2.
    """
    weight = torch.randn(count // COLUMNS, COLUMNS)
    for width in bits:
        steps = _steps(weight, QuantSpec(width, GROUP))
        took = timed(steps, 0, setting.device, least=rounds, graph=False, clock=setting.clock)
        yield {
            "bench": "packing",
            "bits": width,
            "group": GROUP,
            "n": len(weight),
            "k": COLUMNS,
            "dtype": "fp32",
            **took["pack"],
            **{f"{name}_seconds_per_1e9": took[name]["us"] * 1e3 / count for name in steps},
        }


def _steps(weight: Tensor, spec: QuantSpec) -> dict[str, Callable[[int], object]]:
    n, owner, bits = len(weight), backend("cpu"), spec.bits
    codes, scale, zero = ops.quantize_rtn(weight, spec)
    packed = PackedWeight(ops.pack(codes, bits), scale, ops.pack(zero.t().contiguous(), bits).t().contiguous())
    runtime = owner.prepack(packed, spec, n, COLUMNS)
    return {
        "copy": lambda _: codes.clone(),
        "pack": lambda _: ops.pack(codes, bits),
        "unpack": lambda _: ops.unpack(packed.words, bits, COLUMNS),
        "prepack": lambda _: owner.prepack(packed, spec, n, COLUMNS),
        "unprepack": lambda _: owner.unprepack(runtime, spec, n, COLUMNS),
        "rtn": lambda _: ops.quantize_rtn(weight, spec),
    }
