"""`mmq demo`: the whole story on the shipped miniatures, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar

_WIDE = 160
"""Characters a line that the table with intervals takes."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json and index.html.")] = Path("demo-out"),
    full: Annotated[bool, typer.Option("--full", help="Every combination of 2, 3, 4 and 16 bits.")] = False,
    seed: Annotated[int, typer.Option(help="Which world of scenes.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize the shipped trained VLMs in many ways and show accuracy, bits per weight, megabytes and speed."""
    from mmq_kernels.demo.run import run_demo
    from mmq_kernels.demo.variants import all_variants, standard_variants

    with progress_bar("preparing") as bar:
        report = run_demo(out, all_variants() if full else standard_variants(), seed=seed, progress=bar)
    if json:
        print_json(report)
    else:
        _print(report, out)


def _print(report: dict[str, Any], out: Path) -> None:
    from mmq_kernels.demo.report import COLUMNS

    console = Console()
    if not console.is_terminal:
        console.width = _WIDE
    wide = console.width >= _WIDE
    table = Table(title="What low bits cost", padding=(0, 1 if wide else 0))
    table.add_column("variant", no_wrap=True)
    for heading in (*(column.heading for column in COLUMNS.values()), "bpw", "MB", "captions/s"):
        table.add_column(heading, justify="right", no_wrap=wide)
    for row in report["rows"]:
        table.add_row(
            row["name"],
            *(_cell(row, key, wide) for key in COLUMNS),
            f"{row['bpw']:.2f}",
            f"{row['memory_bytes'] / 1e6:.2f}",
            f"{row['captions_per_second']:.0f}",
        )
    console.print(table)
    shown = "below each value: its difference to fp32, paired 95% interval" if wide else "*: differs from fp32 (95%)"
    console.print(f"{shown}; NLL: nats per reference token, lower is better; MB: held in memory")
    console.print(f"{report['seconds']:.0f} s; everything is in {out / 'results.json'} and {out / 'index.html'}")


def _cell(row: dict[str, Any], key: str, wide: bool) -> str:
    from mmq_kernels.demo.report import COLUMNS

    value = COLUMNS[key].shown(row["metrics"][key])
    change = row["changes"].get(key)
    if not change:
        return value
    if wide:
        return f"{value}\n{change['low']:+.3f} {change['high']:+.3f}"
    return f"{value}*" if change["low"] > 0 or change["high"] < 0 else value
