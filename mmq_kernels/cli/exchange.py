"""`mmq export` and `mmq import`: checkpoints in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar

Source = Annotated[Path, typer.Argument(help="The folder to read.")]
Target = Annotated[Path, typer.Argument(help="The folder to write.")]


def export(
    source: Source,
    target: Target,
    format: Annotated[str, typer.Option("--format", "-f", help="compressed-tensors, gptq, gptq_v2 or awq.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the quantized model in SOURCE for other tools, codes unchanged; refused where that cannot be done."""
    from mmq_kernels.checkpoint import export_folder

    with progress_bar(f"exporting {source}") as bar:
        facts = export_folder(source, target, format, progress=bar)
    _print(facts | {"target": str(target)}, json)


def import_(source: Source, target: Target, json: Json = False, debug: Debug = False) -> None:
    """Turn a GPTQ, AWQ or compressed-tensors model in SOURCE into one that `mmq_kernels.load` runs, codes unchanged."""
    from mmq_kernels.checkpoint import import_folder

    with progress_bar(f"importing {source}") as bar:
        facts = import_folder(source, target, progress=bar)
    _print(facts | {"target": str(target)}, json)


def _print(facts: dict[str, Any], json: bool) -> None:
    if json:
        print_json(facts)
        return
    console = Console()
    console.print(
        f"{facts['target']}: {facts['layers']} layers of {facts['format']}, {facts['disk_bytes'] / 1e6:,.1f} MB, "
        f"in {facts['seconds']:.1f} s"
    )
    if facts.get("caution"):
        console.print(f"caution: {facts['caution']}")
