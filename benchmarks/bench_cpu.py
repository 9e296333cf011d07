"""What the compiled CPU kernels reach on this machine: gemm against torch's linear, GPTQ against a loop in torch.

    python benchmarks/bench_cpu.py [--quick] [--threads N] [--clock wall|cpu] [--out FILE]

On a machine that does other work, `--threads 1 --clock cpu` counts the seconds that this process computed, and
OMP_WAIT_POLICY=passive keeps a thread that waits from taking the core of the one it waits for.

gemm: 4096 x 4096, group 128, x in fp32; a row for each (bits, m), see `mmq_kernels.bench.gemm`. gptq: one layer
2560 x 2560, 4 bits, group 128, see `mmq_kernels.bench.gptq`.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import chain
from pathlib import Path

import torch
from tables import RESULTS

from mmq_kernels.backends import backend
from mmq_kernels.bench.gemm import bench_gemm
from mmq_kernels.bench.gptq import bench_gptq
from mmq_kernels.bench.lines import line
from mmq_kernels.bench.record import append, provenance
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.shapes import named
from mmq_kernels.spec import BITS

TOKENS = (1, 4, 16, 64, 256)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 bits and a smaller GPTQ layer, in seconds")
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
    seconds = 0.5 if options.quick else 1.0
    setting = Setting.standard(torch.device("cpu"), seconds=seconds, clock=CLOCKS[options.clock])
    shapes = named(["square.4096"])
    if options.quick:
        rows = chain(bench_gemm(setting, shapes, (4,), (128,), (1, 16, 256)), bench_gptq(setting, 1024, rounds=2))
    else:
        rows = chain(bench_gptq(setting, 2560), bench_gemm(setting, shapes, BITS, (128,), TOKENS))
    for row in rows:
        print(line(row), flush=True)
        append(options.out, [row | about])
    print(f"lines appended to {options.out}")


if __name__ == "__main__":
    main()
