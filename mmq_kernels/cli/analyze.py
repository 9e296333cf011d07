"""`mmq analyze`: what the results in a database say about which part of a model to spend bits on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.options import Debug, Json, print_json

if TYPE_CHECKING:
    from mmq_kernels.sweep import Analysis, Result
    from mmq_kernels.sweep.analysis import Point

MAIN_METRICS = ("cider", "accuracy", "text_r1")


def analyze(
    database: Annotated[Path, typer.Argument(help="A results database.")],
    add: Annotated[
        list[Path] | None,
        typer.Option(help="First take in a result table METHOD_TASK.csv of the study; may be given again."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only results of this model.")] = None,
    task: Annotated[str | None, typer.Option(help="Only of this task.")] = None,
    method: Annotated[str | None, typer.Option(help="Only of this method.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Default: cider, accuracy or text_r1, whichever the results have.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random forest.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Importance of each part, each part alone, Pareto fronts: for every model, task and method in DATABASE."""
    from mmq_kernels.sweep import Store
    from mmq_kernels.sweep import analyze as analyzed
    from mmq_kernels.sweep.published import read_published

    published = [result for path in add or [] for result in read_published(path)]
    with Store(database, existing=not published) as store:
        new = store.add(published)
        results = store.results(model=model, task=task, method=method)
        if not results:
            there = "; ".join(
                f"{name}: {', '.join(store.values(name)) or 'none'}" for name in ("model", "task", "method")
            )
            raise ValueError(f"{database} holds no such results ({there})")
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.model, result.task, result.method), []).append(result)
    analyses = [analyzed(group, metric or _metric(group), seed=seed) for _, group in sorted(groups.items())]
    if json:
        print_json({"database": str(database), "added": new, "analyses": [each.to_json() for each in analyses]})
        return
    console = Console()
    if published:
        console.print(f"{database}: {new} results added, {len(published) - new} were there")
    for each in analyses:
        _print(console, each)


def _metric(results: list[Result]) -> str:
    there = sorted({name for result in results for name in result.metrics})
    return next((name for name in MAIN_METRICS if name in there), there[0] if there else MAIN_METRICS[0])


def _print(console: Console, found: Analysis) -> None:
    console.print(f"\n[bold]{found.model}, {found.task}, {found.method}: {found.metric}[/bold], {found.rows} results")
    table = Table("part", *(f"importance: {name}" for name in found.importance), "alone: bits and metric")
    for part in next(iter(found.importance.values())):
        curve = "  ".join(f"{value:g}: {score:.4g}" for value, score in found.alone.get(part, ()))
        table.add_row(part, *(f"{shares[part]:.2f}" for shares in found.importance.values()), curve)
    console.print(table)
    agreement = ", ".join(f"{value:.2f} ({pair})" for pair, value in found.agreement.items())
    console.print(
        f"the forest's cross-validated R^2 is {found.r2:.3f}; {100 * found.interactions:.0f}% of the variance is "
        f"interactions and noise; rank correlation of the measures: {agreement}"
    )
    if found.cost is None:
        console.print("no Pareto front: some results say neither bits a weight nor bytes")
        return
    front = Table(f"Pareto front: {found.cost}", found.metric, "configuration")
    for point in found.front:
        front.add_row(_cost(point, found.cost), f"{point.value:.4g}", _factors(point.factors))
    console.print(front)
    for share, least in found.keeps.items():
        said = f"{_cost(least, found.cost)} ({_factors(least.factors)})" if least else "nothing that was measured"
        console.print(f"{share:.0%} of {found.whole:.4g} is kept by {said}")


def _cost(point: Point, cost: str) -> str:
    return f"{point.cost / 1e9:.3f} GB" if cost == "bytes" else f"{point.cost:.2f} {cost}"


def _factors(factors: Mapping[str, float | str]) -> str:
    return " ".join(
        f"{name}={value:g}" if not isinstance(value, str) else f"{name}={value}" for name, value in factors.items()
    )
