"""The lines of `benchmarks/results`: where they are, which of them count, and how they become a Markdown table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """The lines of a results file; none where it is absent."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def newest(rows: list[Row], *keys: str) -> list[Row]:
    """For each value of `keys` the last line, in the order of first appearance."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found[tuple(row.get(key) for key in keys)] = row
    return list(found.values())


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column left and the others right."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def source(row: Row) -> str:
    """Where a table's numbers come from."""
    if "gpu" in row:
        machine = f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}"
        return f"`{row['command']}` on {machine}, torch {row['torch']}, at {row['commit']}."
    return f"`{row['command']}` on {row['cpu']}, {row['threads']} threads, torch {row['torch']}, at {row['commit']}."
