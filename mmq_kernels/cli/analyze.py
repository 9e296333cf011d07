"""`mmq analyze`: what the results in a database say about which part of a model to spend bits on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar

if TYPE_CHECKING:
    from mmq_kernels.sweep import Analysis, Findings
    from mmq_kernels.sweep.fronts import Point
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
    console.print(f"\n[bold]{found.model}, {found.task}, {found.method}: {found.metric}[/bold], {found.rows} results")
    table = Table("part", "importance", *found.importance, "alone: bits and metric")
    for part, share in found.consensus.items():
        curve = "  ".join(f"{value:g}: {score:.4g}" for value, score in found.alone.get(part, ()))
        table.add_row(part, f"{share:.2f}", *(f"{shares[part]:.2f}" for shares in found.importance.values()), curve)
    console.print(table)
    for measure, reason in found.left_out.items():
        console.print(f"without {measure}: {reason}")
    agreement = ", ".join(f"{value:.2f} ({pair})" for pair, value in found.agreement.items())
    together = ", ".join(f"{share:.0%} {term}" for term, share in found.decomposition.items() if share >= 0.005)
    console.print(
        f"the forest's cross-validated R^2 is {found.r2:.3f}; of the variance{'' if found.full else ' about'} "
        f"{together}; rank correlation of the measures: {agreement}"
    )
    if found.cost is None:
        console.print("no Pareto front: no result says bits a weight, bytes or latency")
        return
    front = Table(f"Pareto front: {found.cost}", found.metric, "configuration")
    for point in found.front:
        front.add_row(shown_cost(point.cost, found.cost), f"{point.value:.4g}", shown_factors(point.factors))
    console.print(front)
    for share, least in found.keeps.items():
        kept = f"{shown_cost(least.cost, found.cost)} ({shown_factors(least.factors)})" if least else None
        console.print(f"{share:.0%} of {found.whole:.4g} is kept by {kept or 'nothing that was measured'}")


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


def shown_cost(value: float, cost: str) -> str:
    """A cost in the unit that it is read in."""
    if cost == "bytes":
        return f"{value / 1e9:.3f} GB"
    return f"{1e3 * value:.3g} ms" if cost == "latency" else f"{value:.2f} {cost}"


def shown_factors(factors: Mapping[str, float | str]) -> str:
    """A configuration on one line."""
    return " ".join(
        f"{name}={value:g}" if not isinstance(value, str) else f"{name}={value}" for name, value in factors.items()
    )
