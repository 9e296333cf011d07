"""What a page is made of: plots, tables, pictures, text to copy. What goes in is data; what comes out is HTML."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from PIL import Image

PICTURE_SIDE = 320
"""Longer side of an embedded picture, in pixels; smaller ones stay as they are."""
TINY_SIDE = 160
"""Pictures below that are enlarged with their pixels visible."""

Cell = str | float | int | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: plain text.
        form: how numbers are written, as `format` takes it; empty for a column of text.
    """

    heading: str
    form: str = ""

    def shown(self, value: Cell) -> str:
        """A cell as plain text; nothing where there is no value."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return ""
        return format(value, self.form) if self.form and not isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Table:
    """Rows under columns, and what they are."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def plain(text: str) -> str:
    """Text for a plot's names, titles and labels, which plotly reads as HTML."""
    return escape(text, quote=False)


def figure(drawn: go.Figure) -> str:
    """A plot, drawn by the page's script from the JSON in it; its texts must have gone through `plain`."""
    drawn.layout.template = "none"
    text = json.dumps(json.loads(drawn.to_json()), separators=(",", ":"), ensure_ascii=True)
    for sign in "<>&":  # no script, comment or end of one, whatever a label says
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<div class="plot"><script type="application/json">{text}</script></div>'


def table(content: Table) -> str:
    """A table that sorts by a click on a heading and filters by what is typed below it."""
    head = "".join(
        f'<th scope="col"{"" if column.form else _TEXT}>{escape(column.heading)}</th>' for column in content.columns
    )
    body = "".join(
        f"<tr>{''.join(_cell(column, value) for column, value in zip(content.columns, row, strict=True))}</tr>"
        for row in content.rows
    )
    return (
        f'<div class="scroll"><table class="sorted"><caption>{escape(content.caption)}<output></output></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


_TEXT = ' class="text"'


def _cell(column: Column, value: Cell) -> str:
    shown = escape(column.shown(value))
    if not column.form:
        return f"<td{_TEXT}>{shown}</td>"
    if isinstance(value, (int, float)) and shown:
        return f'<td data-value="{float(value)!r}">{shown}</td>'
    return f"<td>{shown}</td>"


def copied(text: str) -> str:
    """Text with a button that copies it."""
    return f'<div class="recipe"><pre>{escape(text)}</pre><button type="button">copy</button></div>'


def picture(path: Path, about: str) -> str:
    """An image file, scaled down and embedded; a note where it is missing or damaged."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return f'<div class="nothing">no image {escape(path.name)}</div>'
    tiny = max(small.size) < TINY_SIDE
    data = io.BytesIO()
    small.save(data, "PNG" if tiny else "JPEG", optimize=True, **({} if tiny else {"quality": 82}))
    kind = "png" if tiny else "jpeg"
    return (
        f'<img{" class=tiny" if tiny else ""} alt="{escape(about)}" '
        f'src="data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}">'
    )
