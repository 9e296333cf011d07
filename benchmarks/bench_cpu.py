"""What the compiled CPU kernels reach on this machine: gemm against torch's linear, GPTQ against a loop in torch.

    python benchmarks/bench_cpu.py [--quick] [--threads N] [--clock wall|cpu] [--out FILE]

On a machine that does other work, `--threads 1 --clock cpu` counts the seconds that this process computed, and
OMP_WAIT_POLICY=passive keeps a thread that waits from taking the core of the one it waits for.

gemm: weights rotate through more memory than the last cache holds, so each call reads its weight from memory. One JSON
line per (bits, m): median and spread of the time of a call, its ratio to torch's fp32 and bf16 linear, whose calls
alternate with it (of medians, and of the fastest calls, which other processes disturb least), and GB/s with the byte
formula of `weight_bytes`. The machine's read bandwidth is measured in the same run, and its load is part of every line.

gptq: one layer 2560 x 2560, 4 bits, group 128: Cholesky factor, all blocks and their trailing updates, against the
per-column loop of the paper in plain torch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import RESULTS, append, provenance
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.backends import backend
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import BITS, QuantSpec

ROTATED_BYTES = 160 * 2**20
TOKENS = (1, 4, 16, 64, 256)
DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of torch's own linear that every row is compared with."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter
"""What times are read from; `--clock` sets it."""


def timed(calls: dict[str, Callable[[int], object]], seconds: float, least: int = 5) -> dict[str, dict[str, float]]:
    """Median, quartiles and minimum of each call in microseconds; a call gets the number of its repetition.

    The calls take turns, so what slows the machine down for a while slows all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    start, round_ = clock(), 0
    while round_ < least or clock() - start < seconds:
        round_ += 1
        for name, call in calls.items():
            begin = clock()
            call(round_)
            times[name].append((clock() - begin) * 1e6)
    found = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"us": middle, "us_q1": low, "us_q3": high, "us_min": min(values), "calls": len(values)}
    return found


def read_bandwidth(seconds: float) -> float:
    """GB/s of summing 256 MiB, with torch's threads."""
    source = torch.ones(2**26)
    return source.numel() * 4 / timed({"sum": lambda _: source.sum()}, seconds)["sum"]["us"] / 1e3


def weight_bytes(layer: QuantLinear) -> int:
    """Words + scales + zero points, padding included: what a call must read besides x."""
    return layer.packed_bytes


def random_layer(spec: QuantSpec, n: int, k: int) -> QuantLinear:
    codes = torch.randint(0, spec.max_code + 1, (n, k), dtype=torch.uint8)
    groups = spec.groups(k)
    scale = torch.rand(n, groups).half() * 0.01
    zero = torch.randint(0, spec.max_code + 1, (n, groups), dtype=torch.uint8)
    return QuantLinear.from_codes(codes, scale, zero, spec)


def rotation(make: Callable[[], object], size: int) -> list:
    """Enough copies that a round through them leaves nothing in a cache."""
    return [make() for _ in range(max(2, -(-ROTATED_BYTES // size)))]


def linear_call(weights: list[Tensor], x: Tensor) -> Callable[[int], Tensor]:
    return lambda i: torch.nn.functional.linear(x, weights[i % len(weights)])


def bench_gemm(
    bits: tuple[int, ...], group: int, n: int, k: int, tokens: tuple[int, ...], seconds: float
) -> list[dict]:
    """The packed linear of every width beside torch's, call by call in turns."""
    bandwidth = read_bandwidth(seconds)
    dense = {
        name: rotation(lambda dtype=dtype: torch.randn(n, k).to(dtype), n * k * dtype.itemsize)
        for name, dtype in DENSE.items()
    }
    rows = []
    for width in bits:
        spec = QuantSpec(width, group)
        layers = rotation(lambda spec=spec: random_layer(spec, n, k), n * k * width // 8)
        for m in tokens:
            x = torch.randn(m, k)
            calls = {name: linear_call(weights, x.to(DENSE[name])) for name, weights in dense.items()}
            calls["packed"] = lambda i, x=x, layers=layers: layers[i % len(layers)](x)
            took = timed(calls, seconds)
            packed = took["packed"]
            gigabytes = weight_bytes(layers[0]) / packed["us"] / 1e3
            row = {"bench": "gemm", "bits": width, "group": group, "m": m, "n": n, "k": k, "dtype": "fp32"}
            row |= packed
            row |= {
                "tflops": 2 * m * n * k / packed["us"] / 1e6,
                "weight_bytes": weight_bytes(layers[0]),
                "gb_per_s": gigabytes,
                "read_gb_per_s": bandwidth,
                "bandwidth_share": gigabytes / bandwidth,
            }
            for name in DENSE:
                row[f"torch_{name}_us"] = took[name]["us"]
                row[f"x_torch_{name}"] = took[name]["us"] / packed["us"]
                row[f"x_torch_{name}_best"] = took[name]["us_min"] / packed["us_min"]
            rows.append(row)
            show(row)
    return rows


def show(row: dict) -> None:
    """One line: shape | us | TFLOP/s | GB/s | x torch | share of the bandwidth measured."""
    print(
        f"{row['bits']} bits  m {row['m']:4d} | {row['us']:9.0f} us ({row['us_q1']:.0f}..{row['us_q3']:.0f})"
        f" | {row['tflops']:.3f} TFLOP/s | {row['gb_per_s']:5.1f} GB/s | {row['x_torch_fp32']:5.2f} x fp32"
        f" | {row['x_torch_bf16']:5.2f} x bf16 | fastest {row['us_min']:.0f} us, {row['x_torch_fp32_best']:.2f} x"
        f" | {row['bandwidth_share']:4.0%} of {row['read_gb_per_s']:.0f} GB/s",
        flush=True,
    )


def upper_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq_by_columns(weight: Tensor, hessian: Tensor, spec: QuantSpec, block: int) -> Tensor:
    """The loop of the paper in plain torch, one column at a time; returns the dequantized weight."""
    weight, hinv = weight.clone(), upper_factor(hessian)
    k = weight.shape[1]
    quantized = torch.empty_like(weight)
    for first in range(0, k, block):
        last = min(k, first + block)
        errors = torch.empty(weight.shape[0], last - first)
        for j in range(first, last):
            if j % spec.group_size == 0:
                part = weight[:, j : j + spec.group_size]
                low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
                scale = ((high - low) / spec.max_code).half().float()
                zero = torch.round(-low / scale)
            column = weight[:, j]
            code = (torch.round(column / scale) + zero).clamp(0, spec.max_code)
            quantized[:, j] = scale * (code - zero)
            error = (column - quantized[:, j]) / hinv[j, j]
            weight[:, j:last] -= error[:, None] * hinv[j, j:last]
            errors[:, j - first] = error
        weight[:, last:] -= errors @ hinv[first:last, last:]
    return quantized


def gptq_by_blocks(weight: Tensor, hessian: Tensor, spec: QuantSpec, block: int) -> Tensor:
    """The same with `ops.gptq_block`."""
    weight, hinv = weight.clone(), upper_factor(hessian)
    k = weight.shape[1]
    quantized = torch.empty_like(weight)
    for first in range(0, k, block):
        last = min(k, first + block)
        codes, errors, scale, zero = ops.gptq_block(
            weight[:, first:last], hinv[first:last, first:last], None, None, spec
        )
        wide = [part.float().repeat_interleave(spec.group_size, 1) for part in (scale, zero)]
        quantized[:, first:last] = wide[0] * (codes.float() - wide[1])
        weight[:, last:] -= errors @ hinv[first:last, last:]
    return quantized


def bench_gptq(size: int, repeats: int) -> list[dict]:
    """Both loops on one layer, alternating; how far they agree is part of the result."""
    spec, block = QuantSpec(4, 128), 128
    x = torch.randn(2 * size, size)
    hessian = x.t() @ x / (2 * size) + 0.01 * torch.eye(size)
    weight = torch.randn(size, size) * 0.02
    times: dict[str, list[float]] = {"columns": [], "blocks": [], "factor": []}
    for _ in range(repeats):
        for name, call in (
            ("columns", lambda: gptq_by_columns(weight, hessian, spec, block)),
            ("blocks", lambda: gptq_by_blocks(weight, hessian, spec, block)),
            ("factor", lambda: upper_factor(hessian)),
        ):
            begin = clock()
            call()
            times[name].append(clock() - begin)
    by_columns = gptq_by_columns(weight, hessian, spec, block)
    by_blocks = gptq_by_blocks(weight, hessian, spec, block)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    row = {
        "bench": "gptq",
        "n": size,
        "k": size,
        "bits": 4,
        "group": 128,
        "block": block,
        "seconds": seconds["blocks"],
        "seconds_all": times["blocks"],
        "torch_seconds": seconds["columns"],
        "torch_seconds_all": times["columns"],
        "factor_seconds": seconds["factor"],
        "x_torch": seconds["columns"] / seconds["blocks"],
        "equal_weights": (by_columns == by_blocks).float().mean().item(),
    }
    print(
        f"gptq {size} x {size}, 4 bits g128: {row['seconds']:.2f} s, per-column loop {row['torch_seconds']:.2f} s:"
        f" {row['x_torch']:.1f} x; Cholesky factor alone {row['factor_seconds']:.2f} s;"
        f" {row['equal_weights']:.4%} of the weights equal",
        flush=True,
    )
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 bits and a smaller GPTQ layer, in seconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu needs --threads 1")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.jsonl", help="file that lines are appended to")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu adds up the seconds of all threads: it needs --threads 1")
    global clock
    clock = CLOCKS[options.clock]
    reason = backend("cpu").why_unavailable()
    if reason:
        sys.exit(f"nothing to measure: {reason}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = provenance() | {"clock": options.clock}
    print(" | ".join(str(value) for value in about.values()))
    if options.quick:
        rows = bench_gemm((4,), 128, 4096, 4096, (1, 16, 256), 0.5) + bench_gptq(1024, 1)
    else:
        rows = bench_gptq(2560, 3) + bench_gemm(BITS, 128, 4096, 4096, TOKENS, 1.0)
    append(options.out, (row | about for row in rows))
    print(f"{len(rows)} lines appended to {options.out}")


if __name__ == "__main__":
    main()
