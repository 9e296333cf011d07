"""Writes the tables of README.md and benchmarks/README.md from `benchmarks/results`; with --check compares them.

Only what stands in a results file gets into a table, and each table names the command, machine and commit of its lines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cpu_tables
from recorded import Row, newest, read, source, table

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- tables: begin (written by `python benchmarks/tables.py`) -->\n"
END = "<!-- tables: end -->\n"

GPU_BITS = (8, 4, 3, 2)
GPU_TOKENS = (1, 16, 64, 257, 1024, 4096)
GPU_SIZE = 8192
"""The GPU's table, which `bench_gpu.py` measures: GPU_SIZE x GPU_SIZE, group 128, against fp16."""

_METRICS = {
    "cider": "CIDEr",
    "nll": "caption NLL",
    "vqa": "VQA",
    "vqa_nll": "answer NLL",
    "text_r1": "text R@1",
    "image_r1": "image R@1",
}


def demo() -> str:
    rows = read("demo")
    if not rows:
        return ""
    samples = rows[0]["samples"]
    text = (
        f"**What low bits cost** the demo's models: {samples['caption']} captions, {samples['vqa']} questions, a "
        f"gallery of {samples['retrieval']}; group 64 but for uniform (per tensor); a star marks a difference to fp32 "
        "whose paired 95% bootstrap interval leaves out zero; NLL in nats per reference token, lower is better; bits "
        "per weight of all that the BLIP-2 holds, float embeddings and norms among it; captions/s while the other "
        "model is scored in a second process, half the threads each.\n\n"
    )
    body = [
        [
            row["name"],
            *(_scored(row, key) for key in _METRICS),
            f"{row['bpw']:.2f}",
            f"{row['memory_bytes'] / 1e6:.2f}",
            f"{row['captions_per_second']:.0f}",
        ]
        for row in rows
    ]
    return text + table(["", *_METRICS.values(), "bpw", "MB", "captions/s"], body) + "\n" + source(rows[0]) + "\n"


def _scored(row: Row, key: str) -> str:
    change = row["changes"].get(key)
    star = "*" if change and (change["low"] > 0 or change["high"] < 0) else ""
    digits = 4 if "nll" in key else 3
    return f"{row['metrics'][key]:.{digits}f}{star}"


def gpu() -> str:
    """The linear as `select` serves it, and the same on Triton alone; empty cells for what no results file holds."""
    rows = [row for row in read("gpu") if _in_gpu_table(row)]
    run = ("command", "commit", "gpu", "date")
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in run)]
    found = {(row["bits"], row["m"]): f"{row['x_torch_fp16']:.2f}x" for row in rows}
    alone = {(row["bits"], row["m"]): _triton(row) for row in rows if "triton/packed_us" in row}
    body = [
        [f"{bits} bits{name}", *(cells.get((bits, m), "") for m in GPU_TOKENS)]
        for name, cells in (("", found), (", Triton alone", alone))
        for bits in GPU_BITS
    ]
    text = (
        f"**GPU, {GPU_SIZE} x {GPU_SIZE}, group 128**: speed of the packed linear over torch's fp16 linear in the same "
        "run (ratio of medians), by tokens m; of Triton's two kernels the faster one.\n\n"
    )
    lines = [source(rows[-1])] if rows else []
    if len(found) + len(alone) < 2 * len(GPU_BITS) * len(GPU_TOKENS):
        lines.append("Empty cells were not measured: no GPU has run this commit.")
    return text + table(["", *(f"m = {m}" for m in GPU_TOKENS)], body) + "\n" + "\n\n".join(lines) + "\n"


def _triton(row: Row) -> str:
    return f"{max(row[f'triton/{kernel}_x_torch_fp16'] for kernel in ('packed', 'dense')):.2f}x"


def _in_gpu_table(row: Row) -> bool:
    expected = {"bench": "gemm", "n": GPU_SIZE, "k": GPU_SIZE, "group": 128, "activation": "none", "dtype": "fp16"}
    inside = row.get("bits") in GPU_BITS and row.get("m") in GPU_TOKENS
    return inside and all(row.get(key) == value for key, value in expected.items())


def gptq_error() -> str:
    rows = newest(read("gptq_error"), "bits", "group", "symmetric")
    if not rows:
        return ""
    ways = [key.removesuffix(": time") for key in rows[0] if key.endswith(": time")]
    heading = ["", *(_stored(row) for row in rows)]
    body = [
        [
            way,
            *(
                f"{row[f'{way}: error']:.3f} / {row[f'{way}: held-out error']:.3f} / {row[f'{way}: time']:.1f}x"
                for row in rows
            ),
        ]
        for way in ways
    ]
    text = (
        f"**What GPTQ loses** on {rows[0]['layers']} layers of the demo's BLIP-2: Hessian-weighted error on the "
        "calibration samples / on others / time, each as a share of GPTQ with activation order (`ordered`), mean over "
        "the layers. The layers are tiny: time is mostly overhead.\n\n"
    )
    return text + table(heading, body) + "\n" + source(rows[-1]) + "\n"


def against_llmcompressor() -> str:
    rows = read("against_llmcompressor")
    errors = newest([r for r in rows if r["bench"].endswith("error")], "bits", "group", "symmetric")
    times = newest([r for r in rows if r["bench"].endswith("time")], "bits", "group", "symmetric")
    if not errors or not times:
        return ""
    last, what = errors[-1], ": error, sums"
    ways = [key.removesuffix(what) for key in last if key.endswith(what)]
    body = []
    for way in ways:
        cells = [f"{row[way + what]:.3f} / {row[f'{way}: held-out error, sums']:.3f}" for row in errors]
        seconds = [row.get(f"{way}: seconds") for row in times]
        body.append([way, *cells, " / ".join("-" if s is None else f"{s:.2f}" for s in seconds)])
    text = (
        f"**Beside llm-compressor {last['llmcompressor']}**, its GPTQ with activation ordering and its two observers, "
        f"on {last['layers']} layers of the demo's models: Hessian-weighted error on calibration samples / others, "
        "sums over the layers as shares of its own; seconds for a layer of 2560 x 2560 at the same three settings. "
        "`static` is ours with its grouping, `ordered` groups columns in the order of the work.\n\n"
    )
    return text + table(["", *(_stored(row) for row in errors), "seconds"], body) + "\n" + source(last) + "\n"


def awq_error() -> str:
    rows = newest(read("awq_error"), "model", "component", "spec")
    if not rows:
        return ""
    keys = ("component, calibration", "component, held out", "logits, calibration", "logits, held out")
    body = [[row["model"], row["component"], *(f"{row[key]:.2f}" for key in keys)] for row in rows]
    text = (
        "**What AWQ loses** of the output of the demo's models at 3 bits, group 64, one component alone: squared error "
        "as a share of round to nearest's, of what the component puts out and of the model's logits or scores.\n\n"
    )
    return text + table(["model", "", *keys], body) + "\n" + source(rows[-1]) + "\n"


def full_size_calibrated() -> str:
    rows = newest(read("full_size_calibrated"), "model", "method")
    if not rows:
        return ""
    body = [
        [
            row["model"],
            row["method"],
            ", ".join(f"{count} {name}" for name, count in row["layers"].items()),
            _gb(row["peak_bytes"]),
            _gb(row["bound"]),
            str(row.get("samples", 16)),
            f"{row['core_seconds']:.0f} s of a core" if "core_seconds" in row else f"{row['seconds']:.0f} s",
        ]
        for row in rows
    ]
    text = (
        "**Calibrated at full size**: BLIP-2-OPT-2.7b's and LLaVA-1.5-7B's architectures, random bf16 weights, block "
        "by block from folder to folder; peak of resident memory against 4 x the largest block in fp32 + activations + "
        "2 GiB. First blocks of each part by the method, others to nearest: a block's memory does not depend on how "
        "many there are.\n\n"
    )
    heading = ["model", "method", "layers", "peak memory", "bound", "samples", "time"]
    return text + table(heading, body) + "\n" + source(rows[-1]) + "\n"


def allocation() -> str:
    rows = newest([row for row in read("allocation") if "held_out" in row], "model", "task", "method", "budget")
    if not rows:
        return ""
    body = []
    for row in rows:
        main = next(name for name in ("cider", "accuracy", "text_r1") if name in row["held_out"])
        cells = [f"{row['bpw']:.2f}"]
        for metric in ("nll", main):
            if metric not in row["held_out"]:
                cells += [""] * 3
                continue
            digits = 4 if metric == "nll" else 3
            cells.append(f"{row['held_out'][metric]:.{digits}f}")
            for kind in ("uniform", "by_component"):
                best = row[kind].get(metric)
                cells.append("" if best is None else f"{best['value']:.{digits}f}{_apart(best['difference'])}")
        body.append([f"{row['model']} {row['task']}", row["method"], row["budget"], *cells])
    heading = ["", "method", "budget", "bpw"]
    for metric in ("NLL", "metric"):
        heading += [metric, f"best uniform's {metric}", f"best by component's {metric}"]
    text = (
        "**Bits by `mmq allocate`** on held-out scenes of the demo's world, beside the best of all uniform allocations "
        "within the budget (groups of 32, 64, 128 and a row, both symmetries) and of all with one width a component "
        "(group 64), chosen on the held-out scenes themselves; bits per weight with 16 bits for what is left alone; "
        "metric: CIDEr, accuracy or R@1; a star marks a paired 95% interval of the difference without zero.\n\n"
    )
    return text + table(heading, body) + "\n" + source(rows[-1]) + "\n"


def _apart(difference: Row) -> str:
    return "*" if difference["low"] > 0 or difference["high"] < 0 else ""


def _stored(row: Row) -> str:
    group = "channel" if row["group"] == -1 else f"g{row['group']}"
    return f"{row['bits']} bits {group} {'sym' if row['symmetric'] else 'asym'}"


def full_size() -> str:
    rows = read("full_size")
    if not rows:
        return ""
    row = rows[-1]
    built, quantized, captioned = row["build"], row["quantize"], row["caption"]
    body = [
        ["write the model in bf16", _gb(built["disk_bytes"]), _gb(built["peak_bytes"]), f"{built['seconds']:.0f} s"],
        ["quantize it", _gb(quantized["disk_bytes"]), _gb(quantized["peak_bytes"]), f"{quantized['seconds']:.0f} s"],
        ["load it, caption an image", "", _gb(captioned["peak_bytes"]), f"{captioned['seconds']:.0f} s"],
    ]
    text = (
        f"**Full size**: BLIP-2-OPT-2.7b's architecture, {built['weights'] / 1e9:.2f}e9 random weights, "
        f"`{quantized['recipe']}`, from folder to folder.\n\n"
    )
    return text + table(["step", "on disk", "peak memory", "time"], body) + "\n" + source(row) + "\n"


def sweep() -> str:
    rows = newest([row for row in read("sweep") if row["bench"] == "sweep_speed"], "engine", "workers")
    kills = newest([row for row in read("sweep") if row["bench"] == "sweep_kills"], "engine")
    if not rows:
        return ""
    first = rows[0]
    samples = " and ".join(f"{count} samples of {task}" for task, count in first["samples"].items())
    text = (
        f"**Sweeps**: {first['configurations']} configurations by GPTQ of the demo's BLIP-2 on {samples}, as one "
        f"`mmq sweep` and as separate `mmq quantize` and `mmq eval` ({first['separate_sampled']} configurations were "
        f"run so, times {first['configurations'] // first['separate_sampled']}); of {first['compared']} rows compared "
        f"{first['differ']} differ in any digit.\n\n"
    )
    body = [
        [
            "in one process" if row["engine"] == "local" else f"Ray, {row['workers']} workers",
            f"{row['sweep_seconds']:.0f} s",
            f"{row['separate_seconds_estimated']:.0f} s",
            f"{row['ratio']:.1f}x",
        ]
        for row in rows
    ]
    text += table(["", "sweep", "separately", "ratio"], body) + "\n" + source(first) + "\n"
    for row in kills:
        engine = "In one process" if row["engine"] == "local" else "On Ray"
        text += (
            f"\n{engine}, killed by SIGKILL at {sum(row['kills'].values())} random moments "
            f"({row['kills']['engine']} the command, {row['kills']['worker']} a worker) and started again: of "
            f"{row['rows']} rows {row['lost']} are lost, {row['doubled']} doubled, "
            f"{row['differ']} differ from an undisturbed sweep's. {source(row)}\n"
        )
    return text


def analysis() -> str:
    rows = read("analysis")
    if not rows:
        return ""
    row = rows[-1]
    body = [["the database", f"{row['database_bytes'] / 1e6:.0f} MB", "", "", ""]]
    for name, disk in (("analyze", ""), ("report", f"{row.get('page_bytes', 0) / 1e6:.0f} MB")):
        if f"{name}_seconds" in row:
            times = (f"{row[f'{name}_{kind}']:.0f} s" for kind in ("seconds", "cpu_seconds"))
            body.append([f"`mmq {name}`", disk, *times, _gb(row[f"{name}_peak_bytes"])])
    text = (
        f"**A large sweep**: {row['rows']:,} results in {row['groups']} groups (models x tasks x methods), bits of "
        "nine thirds of blocks, six metrics with intervals each.\n\n"
    )
    return text + table(["", "on disk", "time", "processor time", "peak memory"], body) + "\n" + source(row) + "\n"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


PAGES: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (demo, against_llmcompressor, gpu, cpu_tables.gemm_at_best, full_size),
    "benchmarks/README.md": (
        cpu_tables.gemm_otherwise,
        cpu_tables.against,
        cpu_tables.alternating,
        cpu_tables.packing,
        cpu_tables.captions,
        cpu_tables.gptq,
        allocation,
        gptq_error,
        awq_error,
        full_size_calibrated,
        sweep,
        analysis,
    ),
}
"""What stands on which page."""


def updated(page: str, tables: tuple[Callable[[], str], ...]) -> str:
    """A page with its tables as the results say; a table without results is left out."""
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    return head + BEGIN + "\n" + "\n".join(filter(None, (table() for table in tables))) + "\n" + END + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is out of date")
    options = parser.parse_args()
    for name, tables in PAGES.items():
        path = ROOT / name
        before = path.read_text()
        after = updated(before, tables)
        if options.check and after != before:
            sys.exit(f"the tables of {name} are out of date: run python benchmarks/tables.py")
        if not options.check:
            path.write_text(after)


if __name__ == "__main__":
    main()
