"""Reports: what a results database says, as a page to read, as text, or as a table for other programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mmq_kernels.page import write_page
from mmq_kernels.sweep.findings import Findings
from mmq_kernels.sweep.report.contents import contents
from mmq_kernels.sweep.report.html import to_html
from mmq_kernels.sweep.report.markdown import to_markdown
from mmq_kernels.sweep.report.rows import to_csv, write_parquet
from mmq_kernels.sweep.store import Result

__all__ = ["FORMATS", "PAGES", "write_report", "write_rows"]

PAGES = {"html": to_html, "md": to_markdown}
"""Formats that hold what was found."""
FORMATS = (*PAGES, "csv", "parquet")


def write_report(
    found: Findings, path: Path, kind: str, *, title: str, about: str, predictions: Callable[[str], Path] | None = None
) -> None:
    """Write what was found, as `html` or `md`; beside `path` first, and then in its place.

    Args:
        title, about: plain text: the heading, and the line under it.
        predictions: where the per-sample predictions of a fingerprint are (`Store.predictions`); None for nowhere.
    """
    write_page(PAGES[kind](title, about, contents(found, predictions)), path)


def write_rows(results: Sequence[Result], path: Path, kind: str) -> None:
    """Write results themselves, all of them, as `csv` or `parquet`.

    Raises:
        ImportError: for parquet without the package pyarrow.
    """
    if kind == "csv":
        write_page(to_csv(results), path)
        return
    beside = path.with_name(f".{path.name}.tmp")
    write_parquet(results, beside)
    os.replace(beside, path)
