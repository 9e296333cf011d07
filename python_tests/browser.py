"""Debian's Chromium, driven by playwright: what a test that needs a real browser asks for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    f"--{flag}"
    for flag in (
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
]
MILLISECONDS = 120_000
"""Plots are drawn in software, on a machine that may be busy."""


@contextmanager
def browsing() -> Iterator[Callable[[Path], tuple[Any, list[str]]]]:
    """A browser, as a function that opens a file with a fresh profile and waits until its plots are drawn.

    It gives the page, and a list that grows by what goes wrong in it: errors, dialogs, calls to the net. Skips the test
    where Chromium or playwright is missing.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        mine = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer stops it
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True, env=mine)

        def opened(path: Path) -> tuple[Any, list[str]]:
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            wrong: list[str] = []
            page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
            page.on("request", lambda asked: asked.url.startswith("http") and wrong.append(f"asked for {asked.url}"))
            page.goto(path.resolve().as_uri())
            page.wait_for_selector("html[data-drawn]", timeout=MILLISECONDS)
            return page, wrong

        try:
            yield opened
        finally:
            browser.close()
