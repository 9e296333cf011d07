"""What the kernels reach on this GPU: linears, GPTQ, whole blocks and decoding, against torch in fp16 in the same run.

    python benchmarks/bench_gpu.py [--full | --all] [--seconds S] [--out FILE] [--roofline FILE]

Meant to take five minutes on an H200: 8192 x 8192, group 128, at 8, 4, 3 and 2 bits, on every kernel that `select`
weighs, and the rates that it should weigh them by; ViT-g's fc1 with bias and gelu fused; one layer of GPTQ; blocks of
BLIP-2; decoding with the whole of it; what a call costs the host. `--full` adds every shape of
`mmq_kernels.bench.shapes` at 2..8 bits; `--all` does so at every number of tokens and group size there, which takes a
quarter of an hour and more. Lines are appended as they are found. Where the package lies
without its git checkout, the environment variable MMQ_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from recorded import RESULTS
from tables import GPU_BITS, GPU_TOKENS

from mmq_kernels.backends import backend
from mmq_kernels.bench.blocks import bench_blocks
from mmq_kernels.bench.decode import bench_decode
from mmq_kernels.bench.gemm import bench_gemm, bench_overhead
from mmq_kernels.bench.gptq import bench_gptq
from mmq_kernels.bench.lines import line
from mmq_kernels.bench.rates import measured
from mmq_kernels.bench.record import Row, append, provenance, read
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.shapes import GROUPS, PATCHES, SHAPES, TOKENS, named
from mmq_kernels.spec import BITS

KERNELS = ("cuda/packed", "cuda/dense", "triton/packed", "triton/dense")
"""What `select` weighs on a GPU, all timed in the same turns."""

FULL_TOKENS = (1, 16, PATCHES, 1024)


def parts(setting: Setting, full: bool, everything: bool) -> dict[str, Callable[[], Iterator[Row]]]:
    """What to run, in this order; a part holds memory only while it runs."""
    beside = KERNELS if backend("triton").why_unavailable() is None else KERNELS[:2]
    square, fc1 = named(["square.8192"]), named(["vit.fc1"])
    chosen: dict[str, Callable[[], Iterator[Row]]] = {
        "linears": lambda: bench_gemm(setting, square, GPU_BITS, (128,), GPU_TOKENS, beside=beside),
        "fused": lambda: bench_gemm(setting, fc1, GPU_BITS, (128,), (PATCHES,), activation="gelu", beside=beside),
        "overhead": lambda: bench_overhead(setting, GPU_BITS),
        "gptq": lambda: bench_gptq(setting, 4096, beside=("triton",) if len(beside) > 2 else ()),
        "blocks": lambda: bench_blocks(setting, (4, 8)),
        "decode": lambda: bench_decode(setting, (4,)),
    }
    others = [shape for name, shape in SHAPES.items() if name != "square.8192"]
    if everything:
        chosen["shapes"] = lambda: bench_gemm(setting, [*square, *others], BITS, GROUPS, TOKENS)
    elif full:
        chosen["shapes"] = lambda: bench_gemm(setting, others, BITS, (128,), FULL_TOKENS)
    return chosen


def draw(results: Path, page: Path) -> None:
    """The roofline, where plotly is there: a machine with a GPU and no network may lack it."""
    try:
        from mmq_kernels.bench.roofline import write_roofline
    except ModuleNotFoundError as error:
        print(f"no roofline: {error}; its rows are in {results}")
        return
    write_roofline(read(results), page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every shape at 2..8 bits too")
    parser.add_argument("--all", action="store_true", help="and every number of tokens and group size")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each row")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.jsonl", help="file that lines are appended to")
    parser.add_argument("--roofline", type=Path, help="HTML file to draw the linears to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("nothing to measure: torch sees no CUDA device")
    torch.manual_seed(0)
    about = provenance()
    print(" | ".join(str(value) for value in about.values()))
    setting = Setting.standard(torch.device("cuda", torch.cuda.current_device()), seconds=options.seconds)
    started = time.perf_counter()
    for name, part in parts(setting, options.full, options.all).items():
        begin = time.perf_counter()
        for row in part():
            print(line(row), flush=True)
            append(options.out, [row | about])
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        torch.cuda.empty_cache()
    print("for mmq_kernels/backends/costs.py:", measured(read(options.out), about["gpu"]))
    if options.roofline:
        draw(options.out, options.roofline)
    print(f"{time.perf_counter() - started:.0f} s; lines appended to {options.out}")


if __name__ == "__main__":
    main()
