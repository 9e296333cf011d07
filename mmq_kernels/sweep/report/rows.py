"""All results as one table with a row each, for other programs: CSV or Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmq_kernels.sweep.store import Result

PLAIN = ("fingerprint", "model", "task", "method", "bpw", "bytes", "latency", "seconds", "samples", "seed", "data")


def flat_rows(results: Sequence[Result]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns, and rows: factors as `factor.NAME`, metrics as `NAME` with `NAME.low` and `NAME.high`."""
    factors = sorted({name for result in results for name in result.factors})
    metrics = sorted({name for result in results for name in result.metrics})
    bounded = {name for result in results for name in result.intervals}
    names = [*PLAIN[:4], *(f"factor.{name}" for name in factors)]
    for name in metrics:
        names += [name, f"{name}.low", f"{name}.high"] if name in bounded else [name]
    names += [*PLAIN[4:], "recipe"]
    rows = []
    for result in results:
        row: dict[str, Any] = {name: getattr(result, name) for name in (*PLAIN, "recipe")}
        row |= {f"factor.{name}": value for name, value in result.factors.items()}
        row |= result.metrics
        for name, (low, high) in result.intervals.items():
            row |= {f"{name}.low": low, f"{name}.high": high}
        rows.append(row)
    return names, rows


def to_csv(results: Sequence[Result]) -> str:
    """A line a result, in the order of the results; what is not known is empty."""
    names, rows = flat_rows(results)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_parquet(results: Sequence[Result], path: Path) -> None:
    """The same as Parquet; factors that are numbers in some results and names in others become text.

    Raises:
        ImportError: without the package pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "--format parquet needs the package pyarrow (pip install 'mmq_kernels[analysis]'); --format csv does not"
        ) from None
    names, rows = flat_rows(results)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if len({isinstance(value, str) for value in values if value is not None}) > 1:
            values = [None if value is None else str(value) for value in values]
        elif any(isinstance(value, float) for value in values):
            values = [None if value is None else float(value) for value in values]
        columns[name] = values
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
