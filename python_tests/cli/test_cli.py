"""`mmq` from the user's side: what it prints, what it writes, and one line with exit code 2 for every mistake."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmq_kernels
from mmq_kernels.cli.app import run
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.nn import QuantLinear

BLIP2 = str(weights_folder("blip2"))
ITM = str(weights_folder("blip2-itm"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = WorldSize(train=12, images=8, questions=3, gallery=10)
    return write_world(tmp_path_factory.mktemp("cli") / "world", size=size)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "quantized"
    assert run(["quantize", BLIP2, "--recipe", "vision=rtn:4:g64 language=rtn:3:g64:sym", "-o", str(out)]) == 0
    return out


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `mmq` with --json; returns what it printed."""

    def call(*arguments: str) -> Any:
        capsys.readouterr()
        assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


def test_info_says_what_is_there(said: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    facts = said("info")
    assert facts["version"] == mmq_kernels.__version__
    assert facts["torch"] == torch.__version__
    assert facts["backends"]["reference"] == {"available": True, "why_not": None}
    for state in facts["backends"].values():
        assert state["available"] == (state["why_not"] is None)
    assert run(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("extension", "CPU", "GPUs", "backend cpu", "backend reference"):
        assert word in shown


def test_info_of_a_checkpoint_weighs_it(quantized: Path, said: Callable[..., Any]) -> None:
    facts = said("info", str(quantized))
    assert facts["disk_bytes"] == sum(path.stat().st_size for path in quantized.iterdir())
    assert set(facts["components"]) >= {"vision", "connector", "language"}
    assert facts["components"]["connector"]["bpw"] > 15
    assert facts["components"]["vision"]["bpw"] < 8
    assert sum(facts["quantized_layers"].values()) > 20


def test_quantize_packs_what_the_recipe_names(quantized: Path) -> None:
    model = mmq_kernels.load(quantized)
    packed = {name: m.spec for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {spec.bits for name, spec in packed.items() if name.startswith("vision_model")} == {4}
    assert {(spec.bits, spec.symmetric) for name, spec in packed.items() if "language_model" in name} == {(3, True)}
    assert not any(name.startswith("qformer") for name in packed)


def test_gptq_then_eval(world: Path, tmp_path: Path, said: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    report = said(
        *("quantize", BLIP2, "--recipe", "all=gptq:4:g64", "-o", str(out)),
        *("--calibrate", f"caption:{world / 'coco'}", "--calibrate", f"vqa:{world / 'vqav2'}", "--samples", "16"),
    )
    assert all(layer["used"] == "gptq" and layer["calibration_rows"] > 0 for layer in report["layers"])
    assert report["disk_bytes"] < 0.5 * report["source_bytes"]
    assert not (tmp_path / "out.partial").exists()
    kept = tmp_path / "predictions.jsonl"
    scores = said("eval", str(out), "--task", "vqa", "--data", str(world / "vqav2"), "--predictions", str(kept))
    assert scores["samples"] == 24
    assert scores["metrics"]["accuracy"] > 0.8
    assert scores["metrics"]["nll"] < 0.5
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len([row for row in rows if "prediction" in row]) == 24
    again = said("score", str(kept), "--against", str(kept))
    assert again["metrics"] == scores["metrics"] and again["intervals"] == scores["intervals"]
    assert again["changes"]["nll"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert run(["score", str(kept), "--against", str(kept)]) == 0
    captioned = said("eval", str(out), "--task", "caption", "--data", str(world / "coco"), "--limit", "4")
    assert captioned["samples"] == 4
    assert captioned["metrics"]["cider"] > 1


def test_predictions_are_completed_and_refused(
    world: Path, quantized: Path, tmp_path: Path, said: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "predictions.jsonl"
    asked = ("eval", str(quantized), "--task", "vqa", "--data", str(world / "vqav2"), "--predictions", str(kept))
    scores, whole = said(*asked, "--batch-size", "4"), kept.read_bytes()
    assert scores["ranks"] == 1
    kept.write_bytes(whole[:-100])
    assert "last, is cut off or damaged" in refused(capsys, "score", str(kept))
    assert "is of another run: batch_size is 4 there, 64 here" in refused(capsys, *asked, "--resume")
    again = said(*asked, "--batch-size", "4", "--resume")
    assert again["metrics"] == scores["metrics"] and kept.read_bytes() == whole
    assert run([*asked, "--batch-size", "4", "--resume"]) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert "--resume needs --predictions" in refused(capsys, *asked[:6], "--resume")


def test_retrieval_with_the_matching_model(world: Path, tmp_path: Path, said: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    data = str(world / "flickr30k")
    said(
        *("quantize", ITM, "--recipe", "vision=gptq:4:g64 connector=gptq:8", "-o", str(out)),
        *("--calibrate", f"retrieval:{data}", "--samples", "8"),
    )
    scores = said("eval", str(out), "--task", "retrieval", "--data", data, "--top-k", "3")
    assert scores["metrics"]["text_r10"] == 1.0
    assert scores["metrics"]["image_r1"] > 0.5


def test_tables_for_people(world: Path, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(quantized), "--task", "vqa", "--data", str(world / "vqav2"), "--limit", "6"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "bits per weight" in shown
    assert run(["info", str(quantized)]) == 0
    assert "on disk" in capsys.readouterr().out
    recipe, out = "connector=rtn:4:g64", quantized.parent / "shown"
    assert run(["quantize", BLIP2, "--recipe", recipe, "-o", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"layers quantized, .* left alone: .* MB on disk, .* with [0-9.]+ GB of memory at most", shown)


def test_export_and_import(
    quantized: Path, tmp_path: Path, said: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    facts = said("export", str(quantized), str(there), "--format", "compressed-tensors")
    assert facts["format"] == "compressed-tensors"
    assert re.match(r"\d+ layers are asymmetric", facts["caution"])
    assert facts["disk_bytes"] == sum(path.stat().st_size for path in there.iterdir())
    assert said("import", str(there), str(back))["layers"] == facts["layers"] > 20
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (quantized, back))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert "mmq import" in refused(capsys, "info", str(there))
    assert run(["export", str(quantized), str(tmp_path / "again"), "-f", "compressed-tensors"]) == 0
    shown = capsys.readouterr().out
    assert f"{facts['layers']} layers of compressed-tensors" in " ".join(shown.split())
    assert "caution: " in shown


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `mmq`, which must fail; returns its one line."""
    capsys.readouterr()
    assert run(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mmq: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("all=rtn:1", "bits must be .* from 2 to 8.* got '1'"),
        ("all=rtn:9", "bits must be .* from 2 to 8.* got '9'"),
        ("all=rtn:four", "bits .*four"),
        ("all=rtn:4:g0", "group.* 0"),
        ("all=rtn:4:gx", "gx"),
        ("all=magic:4", "magic"),
        ("audio=rtn:4", "'audio' is no component .*vision.* matches no layer"),
        ("vision_model.encoder.layers.9.*=rtn:4", "matches no layer"),
        ("all=rtn:4 skip=nothing.*", "skip=nothing.* matches no layer"),
        ("", "recipe"),
        ("missing.yaml", "missing.yaml"),
    ],
)
def test_bad_recipes(recipe: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "quantize", BLIP2, "--recipe", recipe, "-o", str(tmp_path / "out"))
    assert re.search(message, line), line
    assert not any(tmp_path.iterdir())


def test_a_component_that_the_model_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "quantize", ITM, "--recipe", "language=rtn:4", "-o", str(tmp_path / "out"))
    assert "no component 'language'" in line
    assert "vision, connector" in line
    assert not any(tmp_path.iterdir())


def test_places_that_hold_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "no model" in refused(
        capsys, "quantize", str(tmp_path / "empty"), "--recipe", "all=rtn:4", "-o", str(tmp_path / "out")
    )
    assert "does not exist" in refused(capsys, "info", str(tmp_path / "nowhere"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_truncated_tensor(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, command in ((quantized, ["info"]), (Path(BLIP2), ["quantize"])):
        folder = tmp_path / command[0]
        shutil.copytree(source, folder)
        weights = folder / "model.safetensors"
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size - 100)
        more = ["--recipe", "all=rtn:4", "-o", str(tmp_path / "out")] if command == ["quantize"] else []
        assert "truncated in tensor" in refused(capsys, *command, str(folder), *more)
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_no_image(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "coco"
    shutil.copytree(world / "coco", data)
    for folder in ("train2017", "val2017"):
        broken = sorted((data / folder).iterdir())[2]
        broken.write_bytes(b"no image")
    line = refused(capsys, "eval", BLIP2, "--task", "caption", "--data", str(data))
    assert broken.name in line
    recipe = ("--recipe", "language=gptq:4", "-o", str(tmp_path / "out"))
    calibrate = ("--calibrate", f"caption:{data}", "--samples", "12")
    assert "is no image" in refused(capsys, "quantize", BLIP2, *recipe, *calibrate)
    assert not (tmp_path / "out").exists()


def test_data_of_another_layout(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "coco"
    shutil.copytree(world / "coco", data)
    path = data / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps([{"image": "a.jpg", "text": "another layout"}]))
    assert "captions_val2017.json" in refused(capsys, "eval", BLIP2, "--task", "caption", "--data", str(data))
    path.write_text("{")
    assert "captions_val2017.json" in refused(capsys, "eval", BLIP2, "--task", "caption", "--data", str(data))
    path.unlink()
    assert "captions_val2017.json" in refused(capsys, "eval", BLIP2, "--task", "caption", "--data", str(data))
    wrong = str(world / "vqav2")
    assert wrong in refused(capsys, "eval", BLIP2, "--task", "caption", "--data", wrong)


def test_calibration_mistakes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("quantize", BLIP2, "--recipe", "all=gptq:4:g64", "-o", str(tmp_path / "out"))
    assert "--calibrate" in refused(capsys, *base)
    coco = f"caption:{world / 'coco'}"
    line = refused(capsys, *base, "--calibrate", coco, "--samples", "13")
    assert "12" in line
    assert "13" in line
    assert "TASK:DIR" in refused(capsys, *base, "--calibrate", "nonsense")
    assert "retrieval" in refused(capsys, *base, "--calibrate", f"retrieval:{world / 'flickr30k'}", "--samples", "4")
    assert not any(tmp_path.iterdir())


def test_tasks_and_options(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(world / "coco")
    assert "'singing'" in refused(capsys, "eval", BLIP2, "--task", "singing", "--data", data)
    assert "Blip2ForImageTextRetrieval" in refused(capsys, "eval", ITM, "--task", "caption", "--data", data)
    assert "limit" in refused(capsys, "eval", BLIP2, "--task", "caption", "--data", data, "--limit", "0")
    assert "batch" in refused(capsys, "eval", BLIP2, "--task", "caption", "--data", data, "--batch-size", "0")
    assert "device" in refused(capsys, "eval", BLIP2, "--task", "caption", "--data", data, "--device", "quantum")


def test_a_target_that_is_taken(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in quantized.iterdir()}
    line = refused(capsys, "quantize", BLIP2, "--recipe", "all=rtn:4", "-o", str(quantized))
    assert "not empty" in line
    assert {path.name: path.stat().st_mtime_ns for path in quantized.iterdir()} == before


def test_a_full_disk(world: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the system call fails in the same place."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from mmq_kernels.cli.app import run; sys.exit(run(sys.argv[1:]))"
    )
    for method, more in (("rtn", ()), ("gptq", ("--calibrate", f"caption:{world / 'coco'}", "--samples", "4"))):
        out = tmp_path / method
        arguments = ("quantize", BLIP2, "--recipe", f"vision=rtn:4 language={method}:4", "-o", str(out), *more)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("mmq: ")]
        assert len(lines) == 1, done.stderr
        assert "free some space" in lines[0]
        assert not out.exists()
        assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_formats_that_cannot_carry_a_model(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    line = refused(capsys, "export", str(quantized), out, "--format", "awq")
    assert "it has 3 bits" in line
    assert "compressed-tensors" in line.partition("For all of it, ")[2]
    assert "'gguf'" in refused(capsys, "export", str(quantized), out, "--format", "gguf")
    assert "--format" in refused(capsys, "export", str(quantized), out)
    assert "is not quantized" in refused(capsys, "import", BLIP2, out)
    assert "own format already" in refused(capsys, "import", str(quantized), out)
    assert not any(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bits"):
        run(["quantize", BLIP2, "--recipe", "all=rtn:9", "-o", str(tmp_path / "out"), "--debug"])


def test_the_command_line_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("info", "quantize", "export", "import", "eval", "demo"):
        assert command in shown
    assert "'paint'" in refused(capsys, "paint")
    assert "--out" in refused(capsys, "quantize", BLIP2)
    assert "one of --recipe and --config must be given, got neither" in refused(capsys, "quantize", BLIP2, "-o", "x")
    assert "--tsak" in refused(capsys, "eval", BLIP2, "--tsak", "vqa")
    assert run([]) == 0
    assert "quantize" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "mmq_kernels", "info", "--json"], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout)["version"] == mmq_kernels.__version__


def test_a_configuration_of_the_study_is_a_recipe(
    tmp_path: Path, said: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "uniform.json"
    config.write_text('[{"model_part": "LLM", "layer_group": "ALL", "layer_type": "MLP", "num_bits": 5},]')
    facts = said("quantize", BLIP2, "--config", str(config), "-o", str(tmp_path / "out"))
    assert facts["recipe"] == "language/mlp=uniform:5:tensor:asym"
    assert facts["layers"] and {layer["bits"] for layer in facts["layers"]} == {5}
    both = ("--config", str(config), "--recipe", "all=rtn:4", "-o", str(tmp_path / "other"))
    assert "got both" in refused(capsys, "quantize", BLIP2, *both)
    config.write_text("[]")
    assert not said("quantize", BLIP2, "--config", str(config), "-o", str(tmp_path / "untouched"))["layers"]


def test_analyze_takes_in_tables_and_says_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = (2, 4, 16)
    rows = [f"{v},{q},{t},{v * t}" for v in bits for q in bits for t in bits]
    table = tmp_path / "gptq_captioning.csv"
    table.write_text("\n".join(["vit_bits,qformer_bits,llm_bits,CIDEr", *rows]))
    command = ["analyze", str(tmp_path / "results.db"), "--json"]
    assert run(command) == 2
    assert "no results database" in capsys.readouterr().err
    assert run([*command, "--add", str(table)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["added"] == 27
    (found,) = facts["analyses"]
    assert found["rows"] == 27 and found["metric"] == "cider"
    assert found["importance"]["forest"]["connector"] < 0.1
    assert run(command[:2]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Salesforce/blip2-opt-2.7b, caption, gptq: cider, 27 results" in shown
    assert "99% of 256 is kept by" in shown
    assert run([*command, "--add", str(table), "--method", "awq"]) == 2
    assert "holds no such results (model: Salesforce/blip2-opt-2.7b; task: caption; method: gptq)" in (
        " ".join(capsys.readouterr().err.split())
    )
