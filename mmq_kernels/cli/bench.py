"""`mmq bench`: what the kernels of this machine reach, against torch in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.devices import chosen_device
from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar
from mmq_kernels.spec import BITS, GROUP_MULTIPLE, PER_CHANNEL

if TYPE_CHECKING:
    from mmq_kernels.bench.setting import Setting
    from mmq_kernels.bench.shapes import Shape

SUITES = ("gemm", "gptq", "blocks", "decode", "demo", "threads")
_DEFAULT_SUITES = ("gemm", "gptq")
_DEFAULT_SHAPES = "vit.fc1,opt.fc1,square.4096"
_QUICK_SHAPES = "qformer.attention"
_CPU_TOKENS, _CUDA_TOKENS, _QUICK_TOKENS = "1,16,257", "1,16,64,257,1024", "1,16"


class Part(NamedTuple):
    """A suite to run: how many rows it has, and what yields them."""

    total: int
    rows: Iterator[dict[str, Any]]


def bench(
    suites: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SUITES)}; default gemm gptq.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    bits: Annotated[str, typer.Option(help="Widths, with commas: 2..8.")] = "4,8",
    groups: Annotated[str, typer.Option(help="Group sizes of the suite gemm; -1: a whole row.")] = "128",
    tokens: Annotated[str | None, typer.Option(help="Rows of x in the suite gemm.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Of the suite gemm: vit.fc1, a family such as opt, or NxK.")
    ] = None,
    beside: Annotated[
        str, typer.Option(help="Backends or kernels to time in the same turns of the suite gemm: triton,cuda/dense.")
    ] = "",
    rounded: Annotated[
        bool, typer.Option("--rounded", help="Time activations of 8 bits too, in the suite gemm on a CPU.")
    ] = False,
    against: Annotated[
        bool,
        typer.Option("--against", help="Time torch's int4 kernel and ONNX Runtime too, in the suite gemm on a CPU."),
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="The suite demo: captions/s and memory of the demo's BLIP-2.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="fp16 (default on cuda), bf16 or fp32 (default on a CPU).")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time for each row; default 0.5.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small and rough: whether it runs, not how fast.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File that JSON lines are appended to.")] = None,
    roofline: Annotated[Path | None, typer.Option(help="HTML file to draw the suite gemm to.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the packed layers, GPTQ, whole blocks and decoding; every row beside torch's own time for the same."""
    from mmq_kernels.bench.record import append, provenance
    from mmq_kernels.bench.roofline import write_roofline
    from mmq_kernels.bench.setting import DTYPES, Setting

    chosen = list(dict.fromkeys([*(suites or []), *(["demo"] if demo else [])] or _DEFAULT_SUITES))
    for suite in chosen:
        if suite not in SUITES:
            raise ValueError(f"SUITE must be one of {', '.join(SUITES)}, got {suite!r}")
    if roofline and "gemm" not in chosen:
        raise ValueError(f"--roofline must go with the suite gemm, got {' '.join(chosen)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"--seconds must be positive, got {seconds}")
    target = chosen_device(device)
    if (rounded or against) and target.type != "cpu":
        raise ValueError(f"--rounded and --against must be measured on the CPU, got --device {target}")
    setting = Setting.standard(target, dtype_name=dtype, seconds=seconds, quick=quick)
    widths = _numbers("--bits", bits, "from 2 to 8", lambda value: value in BITS)
    parts = {
        "gemm": lambda: _gemm(setting, widths, groups, tokens, shapes, beside, rounded, against),
        "gptq": lambda: _gptq(setting),
        "blocks": lambda: _blocks(setting, widths),
        "decode": lambda: _decode(setting, widths),
        "demo": lambda: _demo(setting, widths),
        "threads": lambda: _threads(setting),
    }
    running = [parts[suite]() for suite in chosen]
    about, rows = provenance(), []
    with progress_bar("measuring") as bar:
        for row in (row | about for part in running for row in part.rows):
            rows.append(row)
            bar(len(rows), sum(part.total for part in running), row["bench"])
            if out:
                append(out, [row])
    if roofline:
        write_roofline(rows, roofline)
    if json:
        print_json({"about": about, "rows": rows})
    else:
        _print(rows, about, [path for path in (out, roofline) if path])


def _gemm(
    setting: Setting,
    bits: list[int],
    groups: str,
    tokens: str | None,
    shapes: str | None,
    beside: str,
    rounded: bool,
    against: bool,
) -> Part:
    from mmq_kernels.bench.gemm import bench_gemm

    default = _QUICK_TOKENS if setting.quick else _CUDA_TOKENS if setting.device.type == "cuda" else _CPU_TOKENS
    rows_of_x = _numbers("--tokens", tokens or default, "of at least 1", lambda value: value > 0)
    sizes = _numbers(
        "--groups",
        groups,
        f"that are {PER_CHANNEL} or positive multiples of {GROUP_MULTIPLE}",
        lambda value: value == PER_CHANNEL or (value > 0 and value % GROUP_MULTIPLE == 0),
    )
    chosen = _shapes(shapes or (_QUICK_SHAPES if setting.quick else _DEFAULT_SHAPES))
    count = len(chosen) * len(sizes) * len(bits) * len(rows_of_x)
    others = tuple(filter(None, beside.split(",")))
    return Part(
        count, bench_gemm(setting, chosen, bits, sizes, rows_of_x, beside=others, rounded=rounded, against=against)
    )


def _gptq(setting: Setting) -> Part:
    from mmq_kernels.bench.gptq import bench_gptq

    size = 256 if setting.quick else 4096 if setting.device.type == "cuda" else 2560
    return Part(1, bench_gptq(setting, size))


def _blocks(setting: Setting, bits: list[int]) -> Part:
    from mmq_kernels.bench.blocks import BLOCKS, bench_blocks

    return Part((len(BLOCKS) + 1) * len(bits), bench_blocks(setting, bits))  # one block has two numbers of tokens


def _decode(setting: Setting, bits: list[int]) -> Part:
    from mmq_kernels.bench.decode import bench_decode

    return Part(len(bits), bench_decode(setting, bits))


def _demo(setting: Setting, bits: list[int]) -> Part:
    from mmq_kernels.bench.captions import bench_captions
    from mmq_kernels.demo import weights_folder

    images = 2 if setting.quick else 32
    ways = 2 if setting.device.type == "cpu" else 1
    return Part(ways * len(bits), bench_captions(setting, weights_folder("blip2"), bits, images=images))


def _threads(setting: Setting) -> Part:
    from mmq_kernels.bench.alternating import bench_alternating

    return Part(1, bench_alternating(setting, size=256 if setting.quick else 2048))


def _numbers(option: str, text: str, requirement: str, valid: Callable[[int], bool]) -> list[int]:
    """Integers with commas between them.

    Raises:
        ValueError: naming the option, its requirement and the value got.
    """
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(valid(value) for value in values):
        raise ValueError(f"{option} must be integers {requirement} with commas between them, got {text!r}")
    return list(dict.fromkeys(values))


def _shapes(text: str) -> list[Shape]:
    from mmq_kernels.bench.shapes import named

    try:
        return named(text.split(","))
    except ValueError as error:
        raise ValueError(f"--shapes: {error}") from None


def _print(rows: list[dict[str, Any]], about: dict[str, Any], written: list[Path]) -> None:
    from mmq_kernels.bench.lines import HEADINGS, cells

    table = Table(title="Packed against torch in the same run")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "shape" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    machine = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    console.print(f"{machine}, torch {about['torch']}, at {about['commit']}; us: median (quartiles)")
    limits = next((row for row in rows if "matmul_tflops" in row), None)
    if limits:
        console.print(
            f"limit: the longer of moving the bytes at {limits['read_gb_per_s']:,.0f} GB/s and multiplying at "
            f"{limits['matmul_tflops']:.3g} TFLOP/s, both measured here"
        )
    for path in written:
        console.print(f"written: {path}")
