"""Under which conditions a benchmark runs, and the limits of the machine that it is held against."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from mmq_kernels.bench.timing import Call, Clock, matmul_rate, peak_rate, read_bandwidth, reading, timed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_CPU_ROTATED_BYTES = 160 * 2**20
_CUDA_ROTATED_BYTES = 256 * 2**20
_QUICK_ROTATED_BYTES = 2**20


@dataclass(frozen=True)
class Limits:
    """What this machine reached in this run with nothing but copies and nothing but multiplications.

    A call can be faster still where it computes in something cheaper than its dtype, or finds x in a cache.

    Attributes:
        gb_per_s: see `timing.read_bandwidth`.
        tflops: TFLOP/s, see `timing.matmul_rate`; on a CPU `timing.peak_rate`, where that is higher.
        int8_tops: the same of integers of 8 bits; 0 where nothing measures it.
    """

    gb_per_s: float
    tflops: float
    int8_tops: float = 0.0

    def us(self, moved_bytes: float, operations: float, tflops: float | None = None) -> float:
        """Microseconds that the slower of moving bytes and multiplying takes at least."""
        return max(moved_bytes / self.gb_per_s / 1e3, operations / (tflops or self.tflops) / 1e6)


@dataclass(frozen=True)
class Setting:
    """Where, in which dtype and how long to measure.

    Attributes:
        dtype_name: of the activations and of the weights compared with; a key of `DTYPES`.
        seconds: time spent on one row.
        rotated_bytes: weights take turns through at least so much memory.
        quick: small and rough: to see that everything runs, not how fast.
    """

    device: torch.device
    dtype_name: str
    seconds: float
    rotated_bytes: int
    clock: Clock = time.perf_counter
    quick: bool = False

    @classmethod
    def standard(
        cls,
        device: torch.device,
        *,
        dtype_name: str | None = None,
        seconds: float | None = None,
        clock: Clock = time.perf_counter,
        quick: bool = False,
    ) -> Setting:
        """fp16 on CUDA and fp32 elsewhere; weights rotate through more than the last cache holds."""
        return cls(
            device,
            dtype_name or ("fp16" if device.type == "cuda" else "fp32"),
            seconds if seconds is not None else (0.02 if quick else 0.5),
            _QUICK_ROTATED_BYTES if quick else rotated_bytes(device),
            clock,
            quick,
        )

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def baselines(self) -> dict[str, torch.dtype]:
        """Dtypes of torch's own linear that a row is compared with: the row's, and on a CPU fp32 and bf16."""
        names = (self.dtype_name,) if self.device.type == "cuda" else (self.dtype_name, "fp32", "bf16")
        return {name: DTYPES[name] for name in dict.fromkeys(names)}

    @cached_property
    def limits(self) -> Limits:
        """Measured when first asked for."""
        sizes = (512,) if self.quick else None
        bandwidth = read_bandwidth(self.device, self.seconds, clock=self.clock)
        matmul = matmul_rate(self.device, self.dtype, self.seconds, sizes=sizes, clock=self.clock)
        if self.device.type == "cuda":
            return Limits(bandwidth, matmul)
        peak = peak_rate("bf16" if self.dtype_name == "bf16" else "fp32", clock=self.clock)
        peak = peak or peak_rate("fp32", clock=self.clock)  # without an instruction for bf16, products are fp32's
        return Limits(bandwidth, max(matmul, peak), peak_rate("int8", clock=self.clock))

    @cached_property
    def reading(self) -> tuple[int, Call]:
        """`timing.reading`: of bytes moved in turns with other calls, where a CPU's memory is faster now and then."""
        return reading(self.device)

    def copies(self, weight_bytes: int) -> int:
        """How many copies of a weight take up `rotated_bytes`; at least 2."""
        return max(2, -(-self.rotated_bytes // weight_bytes))

    def timed(self, calls: Mapping[str, Call]) -> dict[str, dict[str, float]]:
        """`timing.timed` under these conditions."""
        return timed(calls, self.seconds, self.device, clock=self.clock)


def rotated_bytes(device: torch.device) -> int:
    """Enough that a round leaves nothing in the last cache: 160 MiB on a CPU; 3 x L2, at least 256 MiB, on a GPU."""
    if device.type != "cuda":
        return _CPU_ROTATED_BYTES
    return max(3 * torch.cuda.get_device_properties(device).L2_cache_size, _CUDA_ROTATED_BYTES)
