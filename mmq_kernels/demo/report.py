"""The demo's HTML page: one file that opens offline, with plots, the table, and what each variant said."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


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

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .7rem; text-align: right }
td small { white-space: nowrap } tr:nth-child(even) { background: #f4f6f8 }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #888 } small { color: #666; display: block }
.sample { display: flex; gap: 1.5rem; margin: 1.5rem 0; align-items: flex-start }
.sample img { width: 192px; height: 192px; image-rendering: pixelated; border: 1px solid #ccc }
.wrong { color: #b00020 } code { background: #f0f0f0; padding: 0 .3rem }
"""


def write_report(results: dict[str, Any], path: Path) -> None:
    """Render `results` (what `run_demo` returns) to `path`, written beside and renamed."""
    rows = results["rows"]
    plots = [_against_size(rows, key) for key in COLUMNS] + [_by_component(rows)]
    body = "\n".join(
        [
            "<h1>What low bits cost a vision-language model</h1>",
            f"<p>{_summary(results)}</p>",
            _table(rows),
            "<p><small>Below each value: the difference to fp32 with its paired 95% bootstrap interval. NLL is nats "
            "per reference token, lower is better. Bits per weight and MB are those of the BLIP-2, everything it "
            "holds counted.</small></p>",
            *(plot.to_html(full_html=False, include_plotlyjs=False) for plot in plots),
            "<h2>What each variant said</h2>",
            *(_sample(i, rows) for i in range(len(rows[0]["examples"]))),
        ]
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>mmq demo</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>{body}</body></html>"
    )
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)


def _summary(results: dict[str, Any]) -> str:
    samples = results["samples"]
    return escape(
        f"Two trained miniatures, a BLIP-2 and a BLIP-2 for image-text matching, quantized into packed weights and "
        f"scored on {samples['caption']} captions, {samples['vqa']} questions and a gallery of "
        f"{samples['retrieval']} scenes. {len(results['rows'])} variants in {results['seconds']:.0f} seconds."
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{column.heading}</th>" for column in COLUMNS.values())
    body = "".join(
        f"<tr><td>{escape(row['name'])}<small><code>{escape(row['recipe'] or 'as trained')}</code></small></td>"
        + "".join(_cell(row, key) for key in COLUMNS)
        + f"<td>{row['bpw']:.2f}</td><td>{row['memory_bytes'] / 1e6:.2f}</td>"
        f"<td>{row['captions_per_second']:.0f}</td></tr>"
        for row in rows
    )
    return f"<table><tr><th>variant</th>{head}<th>bpw</th><th>MB</th><th>captions/s</th></tr>{body}</table>"


def _cell(row: dict[str, Any], key: str) -> str:
    value = COLUMNS[key].shown(row["metrics"][key])
    change = row["changes"].get(key)
    around = f"<small>{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]</small>" if change else ""
    return f"<td>{value}{around}</td>"


def _against_size(rows: Sequence[dict[str, Any]], key: str) -> go.Figure:
    figure = go.Figure()
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bpw"])
        figure.add_trace(
            go.Scatter(
                x=[row["bpw"] for row in chosen],
                y=[row["metrics"][key] for row in chosen],
                text=[escape(row["name"]) for row in chosen],
                mode="lines+markers" if len(chosen) > 1 and not method.endswith("alone") else "markers",
                name=method,
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
        figure.add_trace(go.Bar(x=headings, y=kept, name=escape(row["name"])))
    figure.update_layout(title="One component low, the rest as trained: ratio to fp32", barmode="group", height=380)
    figure.update_yaxes(type="log")
    return figure


def _sample(index: int, rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]["examples"][index]
    picture = base64.b64encode(Path(first["image"]).read_bytes()).decode()
    lines = "".join(
        f"<tr><td>{escape(row['name'])}</td>"
        f"<td style='text-align:left'>{escape(row['examples'][index]['caption'])}</td>"
        f"<td class='{'' if row['examples'][index]['right'] else 'wrong'}'>"
        f"{escape(row['examples'][index]['answer'])}</td></tr>"
        for row in rows
    )
    return (
        f"<div class='sample'><img alt='scene' src='data:image/jpeg;base64,{picture}'><div>"
        f"<b>{escape(first['reference'])}</b><br>{escape(first['question'])} <i>{escape(first['truth'])}</i>"
        f"<table><tr><th>variant</th><th>caption</th><th>answer</th></tr>{lines}</table></div></div>"
    )
