"""`mmq quantize`: a model and a recipe in, a checkpoint of packed weights out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar


def quantize(
    model: Annotated[str, typer.Argument(help="A folder, or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint folder to write.")],
    recipe: Annotated[
        str | None, typer.Option(help='Such as "vision=gptq:4:g64 connector=gptq:8 language=gptq:3:g64", or a file.')
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Instead of a recipe: a configuration file of the study (arXiv 2601.15287).")
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(help="TASK:DIR with TASK caption, vqa or retrieval; may be given again. For gptq, gptq+, awq."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples in all, from training splits.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the calibration draw.")] = 0,
    damping: Annotated[
        float | None, typer.Option(help="Of GPTQ's Hessians, a share of the mean diagonal; default 0.01.")
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="Of GPTQ's columns: input (default), activation, or static (and static groups).")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Of GPTQ's groups: minmax (default), percentile, or search.")] = None,
    percentile: Annotated[float | None, typer.Option(help="Of --grid percentile; default 99.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Columns of a block of GPTQ's; default 128.")] = None,
    catch_up: Annotated[
        float | None, typer.Option(help="0 (default) to 1: how far GPTQ makes good what earlier blocks lost.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind the blocks that a killed run left.")] = False,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize any part of MODEL to 2..8 bits and write a checkpoint that `mmq_kernels.load` runs."""
    from mmq_kernels.checkpoint.quantization import quantize_checkpoint
    from mmq_kernels.cli.devices import chosen_device, peak_bytes
    from mmq_kernels.eval.calibration import CalibrationSource
    from mmq_kernels.quantize import GptqSettings, Recipe, read_study_config

    started = time.perf_counter()
    if recipe is not None and config is None:
        parsed, settings = Recipe.parse(recipe), GptqSettings()
    elif config is not None and recipe is None:
        parsed, settings = read_study_config(config)
    else:
        raise ValueError(f"one of --recipe and --config must be given, got {'neither' if config is None else 'both'}")
    given = {
        "damping": damping,
        "order": order,
        "grid": grid,
        "percentile": percentile,
        "block_size": block_size,
        "catch_up": catch_up,
    }
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    source = CalibrationSource.parse(calibrate or [], samples, seed)
    with progress_bar(f"quantizing {model}") as bar:
        report = quantize_checkpoint(
            model,
            parsed,
            out,
            calibration=source,
            settings=settings,
            resume=resume,
            device=chosen_device(device),
            progress=bar,
        )
    facts = report | {"out": str(out), "seconds": round(time.perf_counter() - started, 2), "peak_bytes": peak_bytes()}
    if json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    console = Console()
    layers = facts["layers"]
    console.print(f"{len(layers)} layers quantized, {len(facts['left_alone'])} left alone: {facts['recipe']}")
    for layer in layers:
        if layer["note"]:
            console.print(f"  {layer['name']}: {layer['note']}")
    before, after = facts["source_bytes"], facts["disk_bytes"]
    console.print(
        f"{facts['out']}: {after / 1e6:,.1f} MB on disk, {after / before:.2f} of the source's {before / 1e6:,.1f} MB, "
        f"in {facts['seconds']:.1f} s, with {facts['peak_bytes'] / 1e9:.2f} GB of memory at most"
    )
