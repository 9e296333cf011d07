"""The demo's HTML page: one file that opens offline, with plots, the table, and what each variant said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from mmq_kernels.page import figure, picture, plain, render, write_page


@dataclass(frozen=True)
class Column:
    """A metric of the table: its heading, and where its value comes from."""

    heading: str
    task: str
    metric: str

    def shown(self, value: float) -> str:
        """The value with as many digits as its metric is worth."""
        return f"{value:.4f}" if self.metric == "nll" else f"{value:.3f}"


COLUMNS = {
    "cider": Column("CIDEr", "caption", "cider"),
    "nll": Column("caption NLL", "caption", "nll"),
    "vqa": Column("VQA", "vqa", "accuracy"),
    "vqa_nll": Column("answer NLL", "vqa", "nll"),
    "text_r1": Column("text R@1", "retrieval", "text_r1"),
    "image_r1": Column("image R@1", "retrieval", "image_r1"),
}
"""The table's metrics by their key in a row. Lower is better for the two NLL, higher for the rest."""


def write_report(results: dict[str, Any], path: Path) -> None:
    """Render `results` (what `run_demo` returns) to `path`, written beside and renamed."""
    rows = results["rows"]
    plots = [_against_size(rows, key) for key in COLUMNS] + [_by_component(rows)]
    body = [
        f"<p>{_summary(results)}</p>",
        _table(rows),
        *(figure(plot) for plot in plots),
        "<h2>What each variant said</h2>",
        *(_sample(i, rows) for i in range(len(rows[0]["examples"]))),
    ]
    write_page(render("What low bits cost a vision-language model", body), path)


def _summary(results: dict[str, Any]) -> str:
    samples = results["samples"]
    return escape(
        f"Two trained miniatures, a BLIP-2 and a BLIP-2 for image-text matching, quantized into packed weights and "
        f"scored on {samples['caption']} captions, {samples['vqa']} questions and a gallery of "
        f"{samples['retrieval']} scenes. {len(results['rows'])} variants in {results['seconds']:.0f} seconds."
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    headings = [column.heading for column in COLUMNS.values()] + ["bpw", "MB", "captions/s"]
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(
        f'<tr><td class="text">{escape(row["name"])}<small><code>{escape(row["recipe"] or "as trained")}</code></small>'
        f"</td>{''.join(_cell(row, key) for key in COLUMNS)}{_number(row['bpw'], 2)}"
        f"{_number(row['memory_bytes'] / 1e6, 2)}{_number(row['captions_per_second'], 0)}</tr>"
        for row in rows
    )
    return (
        '<div class="scroll"><table class="sorted"><caption>Below each value: the difference to fp32 with its paired '
        "95% bootstrap interval. NLL is nats per reference token, lower is better. Bits per weight and MB are those of "
        "the BLIP-2, everything it holds counted.<output></output></caption>"
        f'<thead><tr><th class="text">variant</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _number(value: float, digits: int) -> str:
    return f'<td data-value="{value!r}">{value:.{digits}f}</td>'


def _cell(row: dict[str, Any], key: str) -> str:
    value = row["metrics"][key]
    change = row["changes"].get(key)
    around = f"<small>{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]</small>" if change else ""
    return f'<td data-value="{value!r}">{COLUMNS[key].shown(value)}{around}</td>'


def _against_size(rows: Sequence[dict[str, Any]], key: str) -> go.Figure:
    figure = go.Figure()
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bpw"])
        figure.add_trace(
            go.Scatter(
                x=[row["bpw"] for row in chosen],
                y=[row["metrics"][key] for row in chosen],
                text=[plain(row["name"]) for row in chosen],
                mode="lines+markers" if len(chosen) > 1 and not method.endswith("alone") else "markers",
                name=plain(method),
                hovertemplate="%{text}<br>%{x:.2f} bpw<br>%{y:.3f}",
            )
        )
    heading = COLUMNS[key].heading
    figure.update_layout(
        title=f"{heading} against size", xaxis_title="bits per weight", yaxis_title=heading, height=380
    )
    figure.update_xaxes(type="log", dtick="D1")
    if COLUMNS[key].metric == "nll":
        figure.update_yaxes(type="log", dtick=1)
    return figure


def _by_component(rows: Sequence[dict[str, Any]]) -> go.Figure:
    """How much of each metric is left when one component alone is at 2 bits."""
    base = rows[0]["metrics"]
    figure = go.Figure()
    for row in (row for row in rows if row["method"].endswith("alone")):
        kept = [row["metrics"][key] / base[key] if base[key] else 0.0 for key in COLUMNS]
        headings = [column.heading for column in COLUMNS.values()]
        figure.add_trace(go.Bar(x=headings, y=kept, name=plain(row["name"])))
    figure.update_layout(title="One component low, the rest as trained: ratio to fp32", barmode="group", height=380)
    figure.update_yaxes(type="log")
    return figure


def _sample(index: int, rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]["examples"][index]
    lines = "".join(
        f'<tr><td class="text">{escape(row["name"])}</td>'
        f'<td class="text">{escape(row["examples"][index]["caption"])}</td>'
        f'<td class="text{"" if row["examples"][index]["right"] else " wrong"}">'
        f"{escape(row['examples'][index]['answer'])}</td></tr>"
        for row in rows
    )
    return (
        f"<div class='sample'>{picture(Path(first['image']), 'scene')}<div>"
        f"<b>{escape(first['reference'])}</b><br>{escape(first['question'])} <i>{escape(first['truth'])}</i>"
        '<table><thead><tr><th class="text">variant</th><th class="text">caption</th><th class="text">answer</th></tr>'
        f"</thead><tbody>{lines}</tbody></table></div></div>"
    )
