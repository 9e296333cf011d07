"""The report as a reader meets it: drawn by a real browser, its tables used, hostile text in it left as text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import HOSTILE, fill

from mmq_kernels.cli.app import run
from mmq_kernels.page import render

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from browser import browsing

Page = tuple[Any, list[str], Path, Callable[[Path], tuple[Any, list[str]]]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("report")
    database = fill(
        folder,
        methods=("gptq", "awq"),
        tasks=("caption",),
        samples=24,
        model=f"m/{HOSTILE}",
        constant={"note": HOSTILE},
    )
    report = folder / "report.html"
    assert run(["report", str(database), "-o", str(report), "--title", f"What bits cost {HOSTILE}"]) == 0
    with browsing() as opened:
        yield *opened(report), report, opened


def table(page: Any, heading: str) -> Any:
    """The first table behind a heading."""
    return page.locator(f"xpath=//h3[text()='{heading}']/following::table[contains(@class,'sorted')][1]")


def column(rows: Any, index: int) -> list[str]:
    return rows.evaluate_all(f"rows => rows.filter(row => !row.hidden).map(row => row.cells[{index}].textContent)")


def test_every_plot_is_drawn_and_nothing_goes_wrong(page: Page) -> None:
    shown, wrong, *_ = page
    plots = shown.locator(".plot")
    assert plots.count() >= 8
    assert shown.locator(".plot .js-plotly-plot .main-svg").count() >= plots.count()
    points = "place => place.querySelectorAll('.point, .bars .point, .heatmaplayer image, canvas, .line').length"
    assert all(plots.nth(i).evaluate(points) for i in range(plots.count()))
    lit = shown.locator(".gl-container canvas").evaluate_all(
        """all => all.map(canvas => {
            const flat = document.createElement('canvas');
            [flat.width, flat.height] = [canvas.width, canvas.height];
            const pen = flat.getContext('2d');
            pen.drawImage(canvas, 0, 0);
            return new Set(pen.getImageData(0, 0, flat.width, flat.height).data).size;
        })"""
    )
    assert len(lit) == 2
    assert wrong == []


def test_a_table_sorts_and_filters(page: Page) -> None:
    shown, wrong, *_ = page
    results = table(shown, "Every configuration")
    rows, heads = results.locator("tbody tr"), results.locator("thead th")
    size = heads.locator("button").all_text_contents().index("bits per weight")
    values = [float(text) for text in column(rows, size)]
    assert len(values) == 54
    heads.nth(size).locator("button").click()
    assert [float(text) for text in column(rows, size)] == sorted(values)
    assert heads.nth(size).get_attribute("aria-sort") == "ascending"
    heads.nth(size).locator("button").click()
    assert [float(text) for text in column(rows, size)] == sorted(values, reverse=True)
    heads.nth(size).locator("input").fill("< 5")
    assert [float(text) for text in column(rows, size)] == sorted((v for v in values if v < 5), reverse=True)
    heads.nth(0).locator("input").fill("gpt")
    assert set(column(rows, 0)) == {"GPTQ"}
    left = len(column(rows, 0))
    assert results.locator("output").text_content().strip() == f"Showing {left} of 54."
    heads.nth(0).locator("input").fill("")
    heads.nth(size).locator("input").fill("3..4")
    assert {3 <= float(text) <= 4 for text in column(rows, size)} == {True}
    heads.nth(size).locator("input").fill("")
    assert len(column(rows, size)) == 54 and wrong == []


def test_what_data_says_stays_text(page: Page) -> None:
    shown, wrong, report, _ = page
    assert shown.title() == f"What bits cost {HOSTILE}"
    assert shown.locator("h1").text_content() == f"What bits cost {HOSTILE}"
    assert shown.locator(".sample td", has_text="<script>document.title").count() > 0
    assert shown.locator("script").count() == 2 + shown.locator(".plot").count()
    assert shown.locator("img[src=x], img[onerror]").count() == 0
    text = report.read_text()
    assert HOSTILE not in text and "<!--<img" not in text.split("</script></head>")[1]
    assert wrong == []


def test_a_script_that_got_in_would_not_run(page: Page, tmp_path: Path) -> None:
    """The second wall by itself: a page into whose body a script was put unescaped."""
    path = tmp_path / "broken.html"
    path.write_text(render("safe", ["<script>document.title='taken'</script><img src=x onerror=alert(1)>"]))
    shown, wrong = page[3](path)
    assert shown.title() == "safe"
    assert sum("Content Security Policy" in each for each in wrong) >= 2
    assert not any("dialog" in each for each in wrong)
    shown.close()


def test_the_recipe_is_copied_and_the_theme_changes(page: Page) -> None:
    shown, wrong, *_ = page
    recipe = shown.locator(".recipe").first
    assert recipe.locator("pre").text_content().startswith("mmq quantize 'm/<script>")
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    recipe.locator("button").click()
    shown.locator(".recipe button", has_text="copied").first.wait_for()
    assert shown.evaluate("navigator.clipboard.readText()") == recipe.locator("pre").text_content()
    ground = "getComputedStyle(document.body).backgroundColor"
    axis = "document.querySelector('.js-plotly-plot').layout.font.color"
    light = shown.evaluate(ground), shown.evaluate(axis)
    shown.locator("#theme").click()
    dark = shown.evaluate(ground), shown.evaluate(axis)
    assert light[0] != dark[0] and light[1] != dark[1] and wrong == []
    shown.locator("#theme").click()


def test_pictures_stand_beside_what_was_said(page: Page) -> None:
    shown, wrong, *_ = page
    samples = shown.locator(".sample")
    assert samples.count() == 8
    widths = shown.locator(".sample img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert widths == [96] * 8
    said = samples.first.locator("tbody tr")
    assert 3 <= said.count() <= 12
    assert said.first.locator("td").first.text_content() == "16 bits"
    assert wrong == []
