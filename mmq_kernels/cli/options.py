"""Options and output shared by the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def print_json(value: Any) -> None:
    """One JSON object on standard output; nothing else goes there under ``--json``."""
    print(json.dumps(value, indent=2, default=str))


class Bar:
    """A progress bar with time left, told `bar(done, total, what)`; silent where nobody is watching."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def __call__(self, done: int, total: int, what: str) -> None:
        self._progress.update(self._task, completed=done, total=total, description=what)

    def told(self, what: str) -> Callable[[int, int], None]:
        """What tells it (done, total) of `what`; what is done at the first call says nothing about the speed."""
        begun = False

        def tell(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                self._progress.reset(self._task, completed=done, total=total, description=what)
                begun = True
            self(done, total, what)

        return tell


@contextmanager
def progress_bar(what: str) -> Iterator[Bar]:
    """A bar on standard error, so that standard output stays clean for results."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = Bar(progress)
        bar(0, 1, what)
        yield bar
