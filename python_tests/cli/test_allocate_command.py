"""`mmq allocate` from the user's side."""

import json
import re
from pathlib import Path

import pytest

from mmq_kernels.cli.app import run
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.quantize import Recipe

BLIP2 = str(weights_folder("blip2"))
QUICK = ("--method", "rtn", "--bits", "2,4", "--group", "64", "--probe", "4", "--selection", "6", "--evaluations", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    size = WorldSize(train=12, images=2, questions=2, gallery=2)
    return str(write_world(tmp_path_factory.mktemp("allocate") / "world", size=size) / "vqav2")


def command(data: str, out: Path, budget: str, *more: str) -> list[str]:
    return ["allocate", BLIP2, "--budget", budget, "--task", "vqa", "--data", data, "-o", str(out), *QUICK, *more]


def test_a_recipe_that_quantize_takes(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(command(data, out, "3.5bpw", "--samples", "4", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cost"]["cost"] <= 3.5
    assert run(["quantize", BLIP2, "--recipe", str(out / "recipe.yaml"), "-o", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == report["recipe"]
    assert run(command(data, out, "3.5bpw", "--samples", "4")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in (
        "vision_model.encoder.layers.0",
        "this recipe: ",
        "best uniform: 2.675 bpw",
        "mmq quantize",
        "recipe.yaml",
    ):
        assert word in shown
    assert str(Recipe.parse(out / "recipe.yaml")) in shown


@pytest.mark.parametrize(
    ("budget", "more", "message"),
    [
        ("4bit", (), "budget must be .* as in 4.0bpw, 2GB .* or 30ms, got '4bit'"),
        ("-1bpw", (), "got '-1bpw'"),
        ("30", (), "got '30'"),
        ("2.5bpw", (), "budget 2.5bpw cannot be met: 2bit:g64:asym everywhere takes 2.675bpw, of which 0.4588bpw"),
        ("0.5MB", (), "budget 0.5MB cannot be met: .* takes 0.98"),
        (
            "3bpw",
            ("--dtype", "fp32"),
            "takes 3.133bpw, of which 0.9176bpw .* at 32 bits a weight; --dtype fp16 or bf16",
        ),
        ("3bpw", ("--dtype", "fp12"), "dtype must be one of fp32, fp16, bf16, got 'fp12'"),
        ("3bpw", ("--component", "audio"), "no component 'audio' .* it has vision, connector, language"),
        ("3bpw", ("--task", "singing"), "TASK one of .*, got 'singing"),
        ("3bpw", ("--task", "retrieval"), "missing .*flickr30k"),
        ("3bpw", ("--bits", "two"), "bits must be whole numbers with commas between them, got 'two'"),
        ("3bpw", ("--samples", "1000"), "calibration needs 1000 samples"),
        ("3bpw", ("--per", "layer"), "per must be one of component, block, kind, got 'layer'"),
        ("3ms", ("--tokens", "0"), "tokens must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(
    budget: str, more: tuple[str, ...], message: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(data, tmp_path / "out", budget, "--samples", "4", *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmq: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out" / "measurements.jsonl").exists()
