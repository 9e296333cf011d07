"""A report as Markdown: its words, tables and commands; plots and pictures are the HTML page's."""

from __future__ import annotations

import re
from collections.abc import Sequence

import plotly.graph_objects as go

from mmq_kernels.page import Table
from mmq_kernels.sweep.report.contents import Block, Note, Section, ToCopy
from mmq_kernels.sweep.report.samples import Example

MOST_ROWS = 100
"""Of a table."""


def to_markdown(title: str, about: str, sections: Sequence[Section]) -> str:
    """The report; see `to_html`."""
    lines = [f"# {plain(title)}", "", plain(about), ""]
    for section in sections:
        blocks = [text for block in section.blocks if (text := _block(block))]
        if blocks or section.level == 2:
            lines += [f"{'#' * section.level} {plain(section.title)}", "", *blocks]
    return "\n".join(lines).rstrip() + "\n"


def plain(text: str) -> str:
    """Text of one line that Markdown shows as it is: no markup, no HTML."""
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", " ".join(text.split()))


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"**{plain(block)}**\n"
    if isinstance(block, Note):
        return f"{plain(block.text)}\n"
    if isinstance(block, list):
        return "\n".join(f"- {plain(each)}" for each in block) + "\n"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, ToCopy):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.command)), default=0))
        return f"{plain(block.about)}:\n\n{fence}\n{block.command}\n{fence}\n"
    if isinstance(block, Example):
        return _example(block)
    assert isinstance(block, go.Figure), block
    return ""


def _table(table: Table) -> str:
    lines = [f"{plain(table.caption)}\n"]
    lines.append(f"| {' | '.join(plain(column.heading) for column in table.columns)} |")
    lines.append(f"| {' | '.join('---:' if column.form else '---' for column in table.columns)} |")
    for row in table.rows[:MOST_ROWS]:
        cells = (plain(column.shown(value)) for column, value in zip(table.columns, row, strict=True))
        lines.append(f"| {' | '.join(cells)} |")
    if len(table.rows) > MOST_ROWS:
        lines.append(f"\n{len(table.rows) - MOST_ROWS:,} rows more.")
    return "\n".join(lines) + "\n"


def _example(example: Example) -> str:
    lines = [f"{plain(example.name)}: {plain(example.question)} {plain(example.truth)}".rstrip(), ""]
    lines += [f"- {plain(said.configuration)}: {plain(said.text)}" for said in example.said]
    return "\n".join(lines) + "\n"
