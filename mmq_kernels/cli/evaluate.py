"""`mmq eval`: score a model, quantized or not, on a task's data."""

from __future__ import annotations

from contextlib import nullcontext
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
    activation_bits: Annotated[
        int | None, typer.Option(help="8: packed layers round each token's activations to 8 bits; default as saved.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every prediction here, JSON lines; what is done is kept beside it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind predictions that a killed run left, or complete a cut file.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Metrics with 95% intervals, bits per weight, bytes and speed of MODEL on TASK."""
    from transformers.utils import logging

    from mmq_kernels import checkpoint
    from mmq_kernels import eval as evaluation
    from mmq_kernels.cli.devices import chosen_device
    from mmq_kernels.eval.team import launched, rank_device
    from mmq_kernels.models import component_prefixes

    if resume and predictions is None:
        raise ValueError("--resume needs --predictions, the file to go on with")
    options = evaluation.EvalOptions(batch_size=batch_size, num_beams=beams, meteor=meteor, top_k=top_k)
    with launched() as team:
        if not team.leads:
            logging.disable_progress_bar()
        with team.together():
            processor = checkpoint.load_processor(model)
            prepared = evaluation.prepare(
                task, data, processor, split=split, limit=limit, seed=seed, captions_per_image=captions_per_image
            )
            loaded = checkpoint.load(
                model, device=rank_device(team, chosen_device(device)), activation_bits=activation_bits
            )
        with progress_bar(f"{task}, {model}") if team.leads else nullcontext() as bar:
            result = evaluation.evaluate_prepared(
                loaded,
                prepared,
                options=options,
                predictions=predictions,
                resume=resume,
                team=team,
                progress=None if bar is None else bar.told(f"{task}, {model}"),
            )
        if not team.leads:
            return
    size = evaluation.model_size(loaded, component_prefixes(loaded))
    report = result.to_json(records=False) | {"model": model, "ranks": team.size, "size": size.to_json()}
    if json:
        print_json(report)
    else:
        _print(report)


def score(
    predictions: Annotated[Path, typer.Argument(help="What mmq eval --predictions wrote, or some of its lines.")],
    against: Annotated[
        Path | None, typer.Option(help="Predictions on the same samples: metrics as differences to theirs.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="That they have to be of.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the intervals. Default: that of the run.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of captions: ptb, plain or auto. Default: that of the run.")
    ] = None,
    meteor: Annotated[
        bool | None, typer.Option(help="Captions: METEOR too, where Java is. Default: as in the run.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Metrics with 95% intervals of predictions that were kept, computed again without model or data."""
    from mmq_kernels import eval as evaluation

    def scored(path: Path) -> evaluation.EvalResult:
        return evaluation.score_predictions(path, task=task, seed=seed, tokenizer=tokenizer, meteor=meteor)

    result = scored(predictions)
    report = result.to_json(records=False) | {"predictions": str(predictions)}
    if against is not None:
        changes = evaluation.compare(result, scored(against), seed=result.settings["seed"])
        report |= {"against": str(against), "changes": {name: vars(change) for name, change in changes.items()}}
    if json:
        print_json(report)
        return
    console = Console()
    _print_metrics(console, report, f"{predictions}: {result.task}, {result.samples} samples")
    if against is not None:
        table = Table("metric", "difference", "95% interval, paired", title=f"less {against}")
        for name, change in report["changes"].items():
            table.add_row(name, f"{change['value']:+.4f}", f"{change['low']:+.4f} .. {change['high']:+.4f}")
        console.print(table)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    _print_metrics(console, report, f"{report['model']}: {report['task']}, {report['samples']} samples")
    size = report["size"]
    ranks = f" on {report['ranks']} ranks" if report["ranks"] > 1 else ""
    speed = "nothing left to do"
    if report["samples_per_second"] is not None:
        speed = f"{report['samples_per_second']:.1f} samples/s{ranks}"
    if report["tokens_per_second"]:
        speed += f", {report['tokens_per_second']:.1f} tokens/s"
    console.print(f"{size['bpw']:.3f} bits per weight, {size['memory_bytes'] / 1e6:,.1f} MB held, {speed}")


def _print_metrics(console: Console, report: dict[str, Any], title: str) -> None:
    table = Table("metric", "value", "95% interval", title=title)
    for name, value in report["metrics"].items():
        around = report["intervals"].get(name)
        limits = f"{_shown(around['low'])} .. {_shown(around['high'])}" if around else ""
        table.add_row(name, _shown(value), limits)
    console.print(table)
    for name, why in report["settings"].get("not_computed", {}).items():
        console.print(f"{name} not computed: {why}", markup=False, highlight=False, soft_wrap=True)
    if report["settings"].get("tokenizer") == "plain":
        console.print("captions tokenized by plain, not by PTB as in published numbers, which needs Java")
    for kind, values in report["breakdown"].items():
        console.print(f"{kind}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))


def _shown(value: float | None) -> str:
    return "not computed" if value is None else f"{value:.4f}"
