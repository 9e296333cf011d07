"""The page around its parts: style, plotly once, the page's own script, and what a browser is told not to do.

Text from data is escaped where it is put in. The Content-Security-Policy is a second wall: the browser runs the two
scripts whose hashes it names, and fetches nothing. These two may evaluate strings, which they do not, but which what
drives a browser in a test needs.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path

from plotly.offline import get_plotlyjs


@cache
def _scripts() -> tuple[str, str]:
    """Plotly, and what draws and sorts; line ends as a browser reads them, since it hashes what it reads."""
    own = resources.files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    plotly, own = (script.replace("\r\n", "\n").replace("\r", "\n") for script in (get_plotlyjs(), own))
    return plotly, own


@cache
def _policy() -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in _scripts()
    )
    rules = {
        "default-src": "'none'",
        "script-src": hashes,
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "font-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def render(title: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, piece by piece.
    """
    plotly, own = _scripts()
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style><script>{plotly}</script></head><body>"
        '<button id="theme" type="button" title="light or dark">◐</button>'
        f"<h1>{escape(title)}</h1>{''.join(body)}<script>{own}</script></body></html>"
    )


def write_page(page: str, path: Path) -> None:
    """Write text to `path`: beside it first, and then in its place."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
