"""`mmq eval`: score a model, quantized or not, on a task's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder (quantized or not), or a hub name.")],
    task: Annotated[str, typer.Option(help="caption, vqa, gqa or retrieval.")],
    data: Annotated[Path, typer.Option(help="The data set's folder, laid out as its publisher lays it out.")],
    split: Annotated[str | None, typer.Option(help="Default: the task's evaluation split.")] = None,
    limit: Annotated[int | None, typer.Option(help="A seeded draw of so many samples.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a forward pass.")] = 64,
    beams: Annotated[int | None, typer.Option(help="Instead of the study's decoding.")] = None,
    meteor: Annotated[bool, typer.Option(help="Captions: METEOR too, where Java is.")] = True,
    top_k: Annotated[int, typer.Option(help="Retrieval: candidates that the matching head re-ranks.")] = 128,
    captions_per_image: Annotated[int | None, typer.Option(help="Retrieval: of each image's captions.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw and the intervals.")] = 0,
    predictions: Annotated[Path | None, typer.Option(help="Write every prediction here, JSON lines.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Metrics with 95% intervals, bits per weight, bytes and speed of MODEL on TASK."""
    from mmq_kernels import checkpoint
    from mmq_kernels import eval as evaluation
    from mmq_kernels.cli.devices import chosen_device
    from mmq_kernels.models import component_prefixes

    options = evaluation.EvalOptions(batch_size=batch_size, num_beams=beams, meteor=meteor, top_k=top_k)
    processor = checkpoint.load_processor(model)
    prepared = evaluation.prepare(
        task, data, processor, split=split, limit=limit, seed=seed, captions_per_image=captions_per_image
    )
    loaded = checkpoint.load(model, device=chosen_device(device))
    with progress_bar(f"{task}, {model}") as bar:
        result = evaluation.evaluate_prepared(
            loaded,
            prepared,
            options=options,
            predictions=predictions,
            progress=lambda done, total: bar(done, total, f"{task}, {model}"),
        )
    size = evaluation.model_size(loaded, component_prefixes(loaded))
    report = result.to_json(records=False) | {"model": model, "size": size.to_json()}
    if json:
        print_json(report)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    title = f"{report['model']}: {report['task']}, {report['samples']} samples"
    table = Table("metric", "value", "95% interval", title=title)
    for name, value in report["metrics"].items():
        around = report["intervals"].get(name)
        limits = f"{around['low']:.4f} .. {around['high']:.4f}" if around else ""
        table.add_row(name, "not computed" if value is None else f"{value:.4f}", limits)
    console = Console()
    console.print(table)
    for name, why in report["settings"].get("not_computed", {}).items():
        console.print(f"{name} not computed: {why}", markup=False, highlight=False, soft_wrap=True)
    if report["settings"].get("tokenizer") == "plain":
        console.print("captions tokenized by plain, not by PTB as in published numbers, which needs Java")
    for kind, values in report["breakdown"].items():
        console.print(f"{kind}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    size = report["size"]
    speed = f"{report['samples_per_second']:.1f} samples/s"
    if report["tokens_per_second"]:
        speed += f", {report['tokens_per_second']:.1f} tokens/s"
    console.print(f"{size['bpw']:.3f} bits per weight, {size['memory_bytes'] / 1e6:,.1f} MB held, {speed}")
