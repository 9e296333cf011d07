"""`mmq analyze`: what the results in a database say about which part of a model to spend bits on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar

if TYPE_CHECKING:
    from mmq_kernels.sweep import Analysis, Findings
    from mmq_kernels.sweep.matched import Comparison

Model = Annotated[str | None, typer.Option(help="Only results of this model.")]
Task = Annotated[str | None, typer.Option(help="Only of this task.")]
Method = Annotated[str | None, typer.Option(help="Only of this method.")]
Metric = Annotated[str | None, typer.Option(help="Default: cider, accuracy or text_r1, whichever the results have.")]
Seed = Annotated[int, typer.Option(help="Of random forest, samples and bootstrap.")]


def analyze(
    database: Annotated[Path, typer.Argument(help="A results database.")],
    add: Annotated[
        list[Path] | None,
        typer.Option(help="First take in a result table METHOD_TASK.csv of the study; may be given again."),
    ] = None,
    model: Model = None,
    task: Task = None,
    method: Method = None,
    metric: Metric = None,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Importance of each part, each part alone, Pareto fronts: for every model, task and method in DATABASE."""
    from mmq_kernels.sweep import Store, find
    from mmq_kernels.sweep.findings import chosen_results
    from mmq_kernels.sweep.published import read_published

    published = [result for path in add or [] for result in read_published(path)]
    with Store(database, existing=not published) as store, progress_bar("analyzing") as bar:
        new = store.add(published)
        results = chosen_results(store, model=model, task=task, method=method)
        found = find(results, metric, seed=seed, predictions=store.predictions, progress=bar)
    if json:
        print_json({"database": str(database), "added": new, **found.to_json()})
        return
    console = Console()
    if published:
        console.print(f"{database}: {new} results added, {len(published) - new} were there")
    _print_all(console, found)


def _print_all(console: Console, found: Findings) -> None:
    for each in found.analyses:
        _print(console, each)
    if found.comparisons:
        _print_methods(console, found.comparisons)
    for reason in found.left_out:
        console.print(f"[yellow]left out[/yellow]: {reason}", highlight=False)


def _print(console: Console, found: Analysis) -> None:
    from mmq_kernels.sweep import words

    console.print(f"\n[bold]{found.model}, {found.task}, {found.method}: {found.metric}[/bold], {found.rows} results")
    table = Table("part", "importance", *found.importance, title="shares of what moves it", title_justify="left")
    for part, share in found.consensus.items():
        table.add_row(part, f"{share:.2f}", *(f"{shares[part]:.2f}" for shares in found.importance.values()))
    console.print(table)
    for measure, reason in found.left_out.items():
        console.print(f"without {measure}: {reason}", markup=False)
    together = ", ".join(f"{share:.0%} {term}" for term, share in found.decomposition.items() if share >= 0.005)
    least = min(found.agreement.values(), default=None)
    agreement = "" if least is None else f"; the measures' ranks agree to at least {least:.2f}"
    console.print(
        f"the forest's cross-validated R^2 is {found.r2:.3f}{agreement}; of the "
        f"variance{'' if found.full else ' about'} {together}"
    )
    _print_alone(console, found)
    if found.cost is None:
        console.print("no Pareto front: no result says bits a weight, bytes or latency")
        return
    front = Table(f"Pareto front: {found.cost}", found.metric, "configuration")
    for each in found.front:
        front.add_row(words.cost(each.cost, found.cost), f"{each.value:.4g}", words.configuration(each.factors))
    console.print(front)
    for share, point in found.keeps.items():
        kept = f"{words.cost(point.cost, found.cost)} ({words.configuration(point.factors)})" if point else None
        console.print(f"{share:.0%} of {found.whole:.4g} is kept by {kept or 'nothing that was measured'}")
    console.print(words.keeping_sentence(found))


def _print_alone(console: Console, found: Analysis) -> None:
    bits = sorted({value for curve in found.alone.values() for value, _ in curve})
    if not bits:
        return
    table = Table(
        "alone, bits", *(f"{value:g}" for value in bits), title=f"{found.metric}, one part low", title_justify="left"
    )
    for part, curve in found.alone.items():
        scores = dict(curve)
        table.add_row(part, *(f"{scores[value]:.4g}" if value in scores else "" for value in bits))
    console.print(table)


def _print_methods(console: Console, comparisons: list[Comparison]) -> None:
    table = Table("methods", "settings", "better in", "mean difference", "p, Holm", "unlike beside the method")
    for each in comparisons:
        ends = f" [{each.low:+.4g}, {each.high:+.4g}]" if each.low is not None else ""
        table.add_row(
            f"{each.task}: {each.one} - {each.other}",
            str(len(each.settings)),
            f"{each.wins} : {each.losses}",
            f"{each.mean:+.4g}{ends}",
            "not tested" if each.adjusted is None else f"{each.adjusted:.2g}",
            ", ".join(each.unlike),
        )
    console.print(table)
