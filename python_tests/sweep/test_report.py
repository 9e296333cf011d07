"""What a report says in words, tables and files, without a browser."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
from synthetic import HOSTILE, fill

from mmq_kernels.cli.app import run
from mmq_kernels.quantize import Recipe
from mmq_kernels.sweep import Result, Store, find, fingerprint, words
from mmq_kernels.sweep.predictions import Predictions
from mmq_kernels.sweep.report.contents import MOST_ROWS, contents
from mmq_kernels.sweep.report.markdown import plain
from mmq_kernels.sweep.report.rows import flat_rows, to_csv
from mmq_kernels.sweep.report.samples import examples

TABLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "paper"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("report"), methods=("gptq", "awq"), tasks=("vqa",), samples=40)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0
    return " ".join(capsys.readouterr().out.split())


def test_markdown_says_what_was_found(database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.md"
    facts = json.loads(said(capsys, "report", str(database), "-o", str(path), "--json"))
    assert facts == {"report": str(path), "format": "md", "results": 54, "bytes": path.stat().st_size}
    text = path.read_text()
    assert "- GPTQ, 27 results: what moves accuracy is language" in text
    assert re.search(r"GPTQ: the least that keeps 95% of 1 at 16 bits is \d+\.\d\d bpw", text)
    assert "At 26 settings matched in all but the method GPTQ beats AWQ" in text
    assert "paired bootstrap over the samples" in text
    recipes = re.findall(r"--recipe '?([^'\\]+)'? \\\n", text)
    assert len(recipes) >= 2
    for recipe in recipes:
        assert Recipe.parse(recipe.strip()).methods <= {"gptq", "awq"}


def test_rows_for_other_programs(database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(database) as store:
        results = store.results()
    said(capsys, "report", str(database), "-o", str(tmp_path / "all.csv"))
    with (tmp_path / "all.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["fingerprint"] for row in read] == [result.fingerprint for result in results]
    for row, result in zip(read, results, strict=True):
        assert float(row["accuracy"]) == result.metrics["accuracy"] and row["recipe"] == result.recipe
        assert {part: int(row[f"factor.{part}"]) for part in result.factors} == result.factors
    parquet = pytest.importorskip("pyarrow.parquet")
    said(capsys, "report", str(database), "--format", "parquet", "-o", str(tmp_path / "all.parquet"))
    columns = parquet.read_table(tmp_path / "all.parquet").to_pydict()
    assert columns["accuracy"] == [result.metrics["accuracy"] for result in results]
    assert columns["factor.vision"] == [result.factors["vision"] for result in results]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "all.parquet"]


def test_rows_of_different_factors_metrics_and_intervals() -> None:
    one = Result("a", "m", "vqa", "rtn", {"group": 64}, {"accuracy": 0.5}, {"accuracy": (0.4, 0.6)})
    other = Result("b", 'm,"n"\n', "vqa", "rtn", {"group": "channel", "vision": 4}, {"nll": 1.5})
    names, rows = flat_rows([one, other])
    assert names.index("accuracy.high") == names.index("accuracy") + 2 and "nll.low" not in names
    assert rows[0]["accuracy.low"] == 0.4 and rows[1]["factor.group"] == "channel"
    read = list(csv.DictReader(to_csv([one, other]).splitlines(keepends=True)))
    assert read[1]["model"] == 'm,"n"\n' and read[1]["accuracy"] == "" and read[0]["factor.vision"] == ""


def test_asking_for_what_is_not_there(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert run(["report", *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "format must be one of html, md, csv, parquet, got --format pdf" in refused(str(database), "--format", "pdf")
    assert "got the ending of x.doc" in refused(str(database), "-o", "x.doc")
    assert "no folder" in refused(str(database), "-o", str(tmp_path / "none" / "r.html"))
    assert "no results database" in refused(str(tmp_path / "none.db"))
    assert "holds no such results (model: models/tiny-blip2; task: vqa" in refused(str(database), "--task", "caption")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs the package pyarrow" in refused(str(database), "-o", str(tmp_path / "r.parquet"))
    assert list(tmp_path.iterdir()) == []


def test_groups_that_say_nothing_are_left_out_by_name(tmp_path: Path) -> None:
    database = fill(tmp_path, methods=("gptq",), tasks=("vqa",), samples=12, predictions=False)
    with Store(database) as store:
        few = [Result(fingerprint(i=i), "few", "vqa", "rtn", {"vision": i}, {"accuracy": i / 9}) for i in range(4)]
        store.add(few)
        found = find(store.results())
        assert [each.model for each in found.analyses] == ["models/tiny-blip2"]
        assert found.left_out == ["few, vqa, rtn: accuracy is in 4 results, at least 10 are needed (metrics: accuracy)"]
        assert contents(found, None)[-1].blocks == [found.left_out]
        assert "no predictions and no intervals were kept" in words.keeping_sentence(found.analyses[0])
        with pytest.raises(ValueError, match=r"few, vqa, rtn: accuracy is in 4 results"):
            find(few)


def test_examples_are_of_images_of_their_own_and_damage_is_said(database: Path) -> None:
    with Store(database) as store:
        found = find(store.results())
        shown, problems = examples(found.results, found.analyses, Predictions(store.predictions))
        assert problems == [] and len(shown) == 8
        assert len({each.name for each in shown}) == 8
        first = shown[0]
        assert first.image is not None and first.image.is_file() and first.question == "what colour is it?"
        assert {each.right for each in first.said} == {True, False}, "of the first half some are wrong"
        assert first.said[0].configuration == "16 bits" and first.said[0].right
        outside = [Result(**{**vars(each), "data": "/nowhere"}) for each in found.results]
        assert examples(outside, found.analyses, Predictions(store.predictions))[0][0].image is not None
        empty = examples(found.results, found.analyses, Predictions())
        assert empty == ([], [])


def test_an_image_outside_of_the_data_is_not_read(tmp_path: Path) -> None:
    database = fill(tmp_path, methods=("gptq",), tasks=("vqa",), samples=12)
    with Store(database) as store:
        for result in store.results():
            path = store.predictions(result.fingerprint)
            path.write_text(path.read_text().replace("val2017/000000.png", "../../secret.png"))
        found = find(store.results())
        shown, _ = examples(found.results, found.analyses, Predictions(store.predictions))
        assert {each.image for each in shown if each.name == "../../secret.png"} == {None}


def test_very_many_rows_are_drawn_from(tmp_path: Path) -> None:
    count = MOST_ROWS + 600
    results = [
        Result(
            fingerprint(i=i), "m", "vqa", "rtn", {"vision": 2 + i % 7, "language": 2 + i // 7 % 7, "draw": i},
            {"accuracy": (i % 7) / 7 + (i * 7919 % 101) / 1000}, bpw=2 + i / count,
        )
        for i in range(count)
    ]  # fmt: skip
    (section,) = [each for each in contents(find(results), None) if each.title == "Every configuration"]
    (table,) = section.blocks
    assert f"{MOST_ROWS:,} of {count:,} configurations" in table.caption  # type: ignore[union-attr]
    assert len(table.rows) == MOST_ROWS  # type: ignore[union-attr]


def test_markdown_shows_text_as_it_is() -> None:
    assert plain(f"a|b *c*\n{HOSTILE}").startswith(r"a\|b \*c\* \<script\>document.title")


def test_configurations_in_words() -> None:
    thirds = {f"vision.{third}": bits for third, bits in zip(("last", "first", "middle"), (3, 4, 4), strict=True)}
    assert words.configuration({**thirds, "layers": "mlp"}) == "vision=4/4/3 layers=mlp"
    same = {f"language.{third}": 4 for third in ("first", "middle", "last")}
    assert words.configuration({**same, "connector": 16, "vision": 2.0}) == "vision=2 connector=16 language=4"
    assert [words.cost(*each) for each in ((3.25, "bpw"), (2.5e9, "bytes"), (0.0123, "latency"))] == [
        "3.25 bpw", "2.500 GB", "12.3 ms",
    ]  # fmt: skip


@pytest.mark.skipif(not TABLES.is_dir(), reason=f"no tables of the study in {TABLES}")
def test_the_study_by_the_same_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database, page = tmp_path / "study.db", tmp_path / "study.html"
    tables = [f"--add={TABLES / f'{name}.csv'}" for name in ("gptq_captioning", "awq_captioning")]
    found = json.loads(said(capsys, "analyze", str(database), *tables, "--json"))
    by_method = {each["method"]: each for each in found["analyses"]}
    for method, bpw in (("gptq", (4.83, 5.15, 5.15)), ("awq", (4.16, 4.83, 5.53))):
        keeps = by_method[method]["keeps"]
        assert [keeps[share]["cost"] for share in ("0.9", "0.95", "0.99")] == pytest.approx(bpw, abs=0.01)
    (compared,) = found["comparisons"]
    assert compared["unlike"] == ["g128 asym / channel sym"] and compared["better"] == "awq"
    said(capsys, "report", str(database), "-o", str(page), "--seed", "1")
    text = page.read_text()
    assert "This is not like for like" in text and text.count('<div class="plot">') == 8
    assert "mmq quantize Salesforce/blip2-opt-2.7b --recipe" in text
