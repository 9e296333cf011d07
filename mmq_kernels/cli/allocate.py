"""`mmq allocate`: a model, a budget and a task in; a recipe with bits for every block out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar


def allocate(
    model: Annotated[str, typer.Argument(help="A folder, or a hub name.")],
    budget: Annotated[str, typer.Option(help="Of the whole model: 4.0bpw (bits a weight), 2GB, or 30ms.")],
    task: Annotated[str, typer.Option(help="What the model is for: caption, vqa, gqa or retrieval.")],
    data: Annotated[Path, typer.Option(help="The data set's folder; its training split is used.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for recipe.yaml and allocation.json.")],
    method: Annotated[str, typer.Option(help="Of every layer: uniform, rtn, gptq, gptq+ or awq.")] = "gptq",
    bits: Annotated[str, typer.Option(help="Widths to choose from; 16 leaves a block alone.")] = "2,3,4,5,6,7,8,16",
    group: Annotated[
        str | None, typer.Option(help="Group sizes to choose from, -1 for a whole row; default: 32,64,-1.")
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Zero points in the middle, not stored.")] = False,
    per: Annotated[str, typer.Option(help="Gets a width of its own: component, block, or kind of layer.")] = "block",
    component: Annotated[
        list[str] | None, typer.Option(help="Only of this component; may be given again. Others are left alone.")
    ] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="TASK:DIR, may be given again. Default: the task and its data.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples in all.")] = 128,
    probe: Annotated[int, typer.Option(help="Samples on which each block alone is measured.")] = 128,
    selection: Annotated[
        int | None, typer.Option(help="Samples that whole models are scored on; default: what is left, at most 1024.")
    ] = None,
    probe_bits: Annotated[str, typer.Option(help="Widths at which that is measured on the whole model.")] = "2,3,4",
    evaluations: Annotated[int, typer.Option(help="Models to quantize and score beside the uniform ones.")] = 24,
    tokens: Annotated[
        int | None,
        typer.Option(help="With ms: through the language model, 1 is a decoding step. Default: one sample's pass."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16, of what is left alone; default: as stored.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Write the quantized model to this folder too.")] = None,
    measurements: Annotated[
        Path | None, typer.Option(help="File of measurements to share between budgets; default: in --out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a forward pass.")] = 64,
    seed: Annotated[int, typer.Option(help="Of calibration and selection samples.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose bits for every block of MODEL within a budget, for a task. A killed run goes on where it was."""
    from mmq_kernels.bench.timing import timed
    from mmq_kernels.cli.devices import chosen_device
    from mmq_kernels.eval.calibration import CalibrationSource
    from mmq_kernels.sweep.allocation import AllocationOptions
    from mmq_kernels.sweep.allocation import allocate as allocated

    source = CalibrationSource.parse(calibrate or [f"{task}:{data}"], samples, seed)
    assert source is not None
    options = AllocationOptions(
        method=method,
        bits=_numbers("bits", bits),
        groups=_numbers("group", group) if group is not None else None,
        symmetric=symmetric,
        per=per,
        components=tuple(component or ()),
        probe_bits=_numbers("probe-bits", probe_bits),
        probe=probe,
        selection=selection,
        evaluations=evaluations,
        tokens=tokens,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
    )
    with progress_bar(f"allocating {budget} to {model}") as bar:
        report = allocated(
            model,
            budget,
            task,
            data,
            out,
            calibration=source,
            options=options,
            device=chosen_device(device),
            timer=partial(timed, graph=False),
            checkpoint=checkpoint,
            measurements=measurements,
            progress=bar,
        )
    if json:
        print_json(report)
    else:
        _print(report)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between them, got {text!r}") from None


def _print(report: dict[str, Any]) -> None:
    console = Console()
    table = Table("block", "bits")
    for unit, choice in report["bits"].items():
        table.add_row(unit, choice)
    console.print(table)
    budget = report["budget"]
    best, uniform = report["cost"], report["uniform"]
    for name, one in (("this recipe", best), ("best uniform", uniform)):
        if one is not None:
            scores = "".join(f", {key} {value:.4f}" for key, value in one.get("metrics", {}).items() if key != "nll")
            console.print(f"{name}: {one['cost']:,.4g} {budget['kind']}, {report['loss']} {one['loss']:.5f}{scores}")
    console.print(f"float model: {report['loss']} {report['float']['loss']:.5f}")
    console.print(
        f"{report['samples']['selection']} selection samples, {report['samples']['calibration']} of calibration"
    )
    for note in report["notes"]:
        console.print(f"note: {note}")
    print(report["recipe"])
    print(f"mmq quantize {report['model']} --recipe {Path(report['out']) / 'recipe.yaml'}")
