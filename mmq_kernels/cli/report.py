"""`mmq report`: what a results database says, as a page that opens offline, as Markdown, or as a table of all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmq_kernels.cli.analyze import Method, Metric, Model, Seed, Task
from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar


def report(
    database: Annotated[Path, typer.Argument(help="A results database.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: report.html, .md and so on.")] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="html, md, csv or parquet (all rows). Default: what -o ends in, else html."),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "What low bits cost",
    model: Model = None,
    task: Task = None,
    method: Method = None,
    metric: Metric = None,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A report on DATABASE: summary, plots, tables, examples, and the recipe to copy."""
    from mmq_kernels.sweep import Store, find
    from mmq_kernels.sweep.findings import chosen_results
    from mmq_kernels.sweep.report import FORMATS, PAGES, write_report, write_rows

    kind = format_ or ("" if output is None else output.suffix[1:].lower()) or "html"
    if kind not in FORMATS:
        asked = f"--format {kind}" if format_ else f"the ending of {output}"
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {asked}")
    path = output or Path(f"report.{kind}")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} for a report")
    with Store(database, existing=True) as store, progress_bar("analyzing") as bar:
        results = chosen_results(store, model=model, task=task, method=method)
        if kind in PAGES:
            found = find(results, metric, seed=seed, predictions=store.predictions, progress=bar)
            groups = f"{len(found.analyses)} {'analyses' if len(found.analyses) > 1 else 'analysis'}"
            about = f"{len(results):,} results of {database.name}, {groups}."
            write_report(found, path, kind, title=title, about=about, predictions=store.predictions)
        else:
            write_rows(results, path, kind)
    if json:
        print_json({"report": str(path), "format": kind, "results": len(results), "bytes": path.stat().st_size})
        return
    Console().print(f"{path}: {len(results):,} results, {path.stat().st_size / 1e6:.1f} MB", highlight=False)
