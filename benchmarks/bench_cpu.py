"""What the compiled CPU kernels reach on this machine: products against torch and others, GPTQ against a loop in torch.

    python benchmarks/bench_cpu.py [PART ...] [--quick] [--bits 4,8] [--tokens 1,16] [--shapes square.4096]
        [--dtype fp32] [--seconds 1] [--threads N] [--clock wall|cpu] [--out FILE]

PART is of `gemm`, `gptq`, `threads`, `packing`, `demo`; default all. A line is appended as soon as it is there, so that
a run can be made in pieces: `gemm --bits 4` takes about a minute, all widths six; each other part a minute at most.

gemm: 4096 x 4096, group 128, a row for each (bits, m): activations as they are and rounded to 8 bits, torch's linear in
fp32 and bf16, its int4 kernel, and ONNX Runtime's at both levels where `mmq_kernels[bench]` is installed; weights
rotate through 160 MiB; read bandwidth and peak rates are of the same run. gptq: 2560 x 2560, 4 bits, group 128.
threads: torch's and packed products in turn. packing: codes to words to layouts and back. demo: captions per second.

On a machine that does other work, `--threads 1 --clock cpu` counts the seconds that this process computed, and
OMP_WAIT_POLICY=passive keeps a thread that waits from taking the core of the one it waits for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from recorded import RESULTS

from mmq_kernels.backends import backend
from mmq_kernels.bench.alternating import bench_alternating
from mmq_kernels.bench.captions import bench_captions
from mmq_kernels.bench.gemm import bench_gemm
from mmq_kernels.bench.gptq import bench_gptq
from mmq_kernels.bench.lines import line
from mmq_kernels.bench.packing import bench_packing
from mmq_kernels.bench.peers import why_no_ort
from mmq_kernels.bench.record import Row, append, provenance
from mmq_kernels.bench.setting import DTYPES, Setting
from mmq_kernels.bench.shapes import PATCHES, named
from mmq_kernels.demo import weights_folder
from mmq_kernels.spec import BITS

TOKENS = (1, 4, 16, 64, PATCHES)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--quick", action="store_true", help="4 bits and smaller layers, in seconds")
    parser.add_argument("--bits", type=numbers, help="of gemm and packing; default all")
    parser.add_argument("--tokens", type=numbers, help=f"of gemm; default {','.join(map(str, TOKENS))}")
    parser.add_argument("--shapes", default="square.4096", help="of gemm: names or families, as `mmq bench` takes them")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of x in gemm")
    parser.add_argument("--seconds", type=float, help="of each row of gemm and of each limit")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu needs --threads 1")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.jsonl", help="file that lines are appended to")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu adds up the seconds of all threads: it needs --threads 1")
    reason = backend("cpu").why_unavailable()
    if reason:
        sys.exit(f"nothing to measure: {reason}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = provenance() | {"clock": options.clock}
    print(" | ".join(str(value) for value in about.values()))
    if why_no_ort():
        print(f"without ONNX Runtime: {why_no_ort()}")
    seconds = options.seconds or (0.3 if options.quick else 1.0)
    setting = Setting.standard(
        torch.device("cpu"), dtype_name=options.dtype, seconds=seconds, clock=CLOCKS[options.clock]
    )
    quick = options.quick
    widths = options.bits or ((4,) if quick else BITS)
    tokens = options.tokens or ((1, 16, PATCHES) if quick else TOKENS)
    shapes = named(options.shapes.split(","))
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "gptq": lambda: bench_gptq(setting, 1024 if quick else 2560, rounds=2 if quick else 5),
        "threads": lambda: bench_alternating(setting),
        "packing": lambda: bench_packing(setting, widths, 2**24 if quick else 2**27),
        "demo": lambda: bench_captions(setting, weights_folder("blip2"), widths, rounds=2 if quick else 5),
        "gemm": lambda: bench_gemm(setting, shapes, widths, (128,), tokens, rounded=True, against=True),
    }
    unknown = [part for part in options.parts if part not in parts]
    if unknown:
        parser.error(f"PART must be one of {', '.join(parts)}, got {unknown[0]!r}")
    for part in options.parts or parts:
        for row in parts[part]():
            print(line(row), flush=True)
            append(options.out, [row | about])
    print(f"lines appended to {options.out}")


if __name__ == "__main__":
    main()
