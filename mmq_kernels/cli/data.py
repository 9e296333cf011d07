"""`mmq data check`: what a data folder holds, what is missing or broken, and what each split is for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.options import Debug, Json, print_json

if TYPE_CHECKING:
    from mmq_kernels.eval.check import FolderReport, SplitReport

data = typer.Typer(help="Data folders, laid out as their publishers lay them out.")


@data.command("check")
def check(
    folder: Annotated[Path, typer.Argument(help="A data set's folder, or one that holds several.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Only this task, which must be there to be evaluated; may be repeated.")
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="Open every image, not 64 of each split.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Which tasks FOLDER can be evaluated and calibrated on; what is missing, doubled or damaged.

    Exit code 2 where a named task cannot be evaluated; where none is named, where something is broken or nothing there.
    """
    from mmq_kernels.eval import TASKS, DataError
    from mmq_kernels.eval.check import check_folder

    report = check_folder(folder, task or TASKS, all_images=images)
    if json:
        print_json(report.to_json())
    else:
        _print(report)
    served = report.tasks("evaluation")
    refused = [name for name in task or () if name not in served]
    if refused:
        raise DataError(f"task {refused[0]} cannot be evaluated from {folder}: {report.why_not(refused[0])}")
    broken = [problem for split in report.splits for problem in split.problems]
    if broken and not task:
        raise DataError(f"{broken[0]} ({len(broken)} in all)" if len(broken) > 1 else broken[0])
    if not any(split.here for split in report.splits):
        raise DataError(f"{folder} holds no data set in a publisher's layout (README: Data folders)")


def _print(report: FolderReport) -> None:
    table = Table("task", "split", "for", "samples", "images", "opened", "state", title=report.folder)
    table.add_column("annotations", overflow="fold")
    for split in report.splits:
        counts = (split.samples, split.images, split.images_opened)
        file = Path(split.files[0])
        where = file.relative_to(report.folder) if file.is_relative_to(report.folder) else file
        row = (split.task, split.split, split.use, *(f"{count:,}" if count else "" for count in counts))
        table.add_row(*row, _state(split), str(where))
    console = Console()
    console.print(table)
    for use in ("evaluation", "calibration"):
        console.print(f"{use}: {', '.join(report.tasks(use)) or 'none'}")
    for split in report.splits:
        if split.set_aside:
            console.print(f"{split.task}: {split.set_aside:,} samples of {split.split} are about images evaluated here")
        for problem in split.problems:
            console.print(f"wrong: {problem}", markup=False, highlight=False, soft_wrap=True)


def _state(split: SplitReport) -> str:
    if not split.here:
        return "missing"
    return "broken" if split.problems else "whole"
