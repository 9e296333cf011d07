"""The demo from end to end on a small world, its page, and a training run of a few steps."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmq_kernels.cli.app import run
from mmq_kernels.demo import run as demo_run
from mmq_kernels.demo.report import COLUMNS, write_report
from mmq_kernels.demo.run import run_demo
from mmq_kernels.demo.variants import Variant, all_variants, standard_variants
from mmq_kernels.demo.world import WorldSize

SMALL = WorldSize(train=16, images=10, questions=4, gallery=20)
VARIANTS = [
    Variant("fp32", "fp32"),
    Variant("gptq 4 bits", "gptq", "gptq", (4, 4, 4)),
    Variant("vision alone, rtn 2 bits", "vision alone", "rtn", (2, 16, 16)),
    Variant("language alone, rtn 2 bits", "language alone", "rtn", (16, 16, 2)),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out, VARIANTS, size=SMALL, calibration_samples=16)


def test_results_hold_a_row_a_variant(demo: tuple[Path, dict[str, Any]]) -> None:
    out, report = demo
    written = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in written["rows"]] == [variant.name for variant in VARIANTS]
    assert written["rows"] == json.loads(json.dumps(report["rows"], default=str))
    for row in written["rows"]:
        assert set(row["metrics"]) == set(COLUMNS)
        assert row["memory_bytes"] > 0
        assert row["captions_per_second"] > 0
        assert len(row["examples"]) == min(demo_run.EXAMPLES, SMALL.images)
    base, low, vision, language = written["rows"]
    assert base["bpw"] == 32
    assert low["bpw"] < 6
    assert base["changes"] == {}
    for row in (low, vision, language):
        for key, change in row["changes"].items():
            difference = row["metrics"][key] - base["metrics"][key]
            assert change["value"] == pytest.approx(difference, abs=1e-9), key
            assert change["low"] <= change["value"] + 1e-9
            assert change["high"] >= change["value"] - 1e-9
    assert {layer["used"] for layer in low["layers"]} == {"gptq"}
    assert vision["components"]["vision"]["bpw"] < 4 < 31 < vision["components"]["connector"]["bpw"]


def test_what_a_variant_does_not_touch_is_as_it_was(demo: tuple[Path, dict[str, Any]]) -> None:
    base, _, _, language = demo[1]["rows"]
    for key in ("text_r1", "image_r1"):  # the matching model has no language model
        assert language["metrics"][key] == base["metrics"][key]


def test_the_page_stands_alone(demo: tuple[Path, dict[str, Any]]) -> None:
    page = (demo[0] / "index.html").read_text()
    body = page.split("</script></head>")[1]
    assert not re.search(r"(src|href)=['\"]?https?:", page.split("<script>")[0] + body)
    for variant in VARIANTS:
        assert variant.name in body
    for column in COLUMNS.values():
        assert column.heading in body
    assert body.count('src="data:image/') == min(demo_run.EXAMPLES, SMALL.images)
    assert body.count('<div class="plot">') == len(COLUMNS) + 1


def test_text_from_data_stays_text(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    report = copy.deepcopy(demo[1])
    attack = "<script>alert('x')</script>"
    report["rows"][1]["name"] = attack
    report["rows"][1]["recipe"] = attack
    report["rows"][1]["method"] = attack
    for example in report["rows"][0]["examples"]:
        example.update(caption=attack, answer=attack, truth=attack, reference=attack, question=attack)
    write_report(report, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert attack not in page
    assert "<script>alert" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_the_standard_rows_are_the_ones_promised() -> None:
    rows = standard_variants()
    assert rows[0].recipe() == ""
    assert [row.bits for row in rows if row.method == "uniform"] == [(b, b, b) for b in (4, 3, 2)]
    assert sum(row.method == "gptq" for row in rows) == 3
    alone = [row for row in rows if row.series.endswith("alone")]
    assert sorted(row.bits for row in alone) == sorted([(2, 16, 16), (16, 2, 16), (16, 16, 2)])
    assert alone[0].recipe(("vision", "connector")) == "vision=rtn:2:g64"
    every = all_variants()
    assert every[: len(rows)] == rows
    assert len({(row.method, row.bits) for row in every}) == len(every) == 1 + 3 * 63


def test_the_command_prints_the_table(
    demo: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(demo_run, "run_demo", lambda *_, **__: demo[1])
    assert run(["demo", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for variant in VARIANTS:
        assert variant.name in shown
    for column in COLUMNS.values():
        assert column.heading in shown
    assert run(["demo", "--out", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(VARIANTS)


def test_a_folder_that_holds_another_world_is_kept(
    demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    assert run(["demo", "--out", str(demo[0]), "--seed", "3"]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_training_runs_and_writes_models_that_load(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmq_kernels.demo.train", "--out", str(tmp_path), "--scale", "0.001"]
    subprocess.run([*command, "--device", "cpu"], check=True, capture_output=True, timeout=280)
    from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

    for name, kind in (("blip2", Blip2ForConditionalGeneration), ("blip2-itm", Blip2ForImageTextRetrieval)):
        model = kind.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert AutoProcessor.from_pretrained(tmp_path / name).num_query_tokens == model.config.num_query_tokens
        assert all(p.isfinite().all() for p in model.parameters())
    for log in ("vision", "blip2", "itm"):
        rows = [json.loads(line) for line in (tmp_path / f"{log}.jsonl").read_text().splitlines()]
        assert rows[-1]["stage"] == log
