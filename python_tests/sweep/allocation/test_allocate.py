"""`allocate` end to end on the demo's models: budgets of all three kinds, killed and gone on, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmq_kernels import load, quantize_model
from mmq_kernels.checkpoint import CheckpointError
from mmq_kernels.demo import weights_folder
from mmq_kernels.eval import DataError, ModelMismatch, model_size
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import Recipe
from mmq_kernels.sweep.allocation import AllocationOptions, BudgetError, allocate

BLIP2 = weights_folder("blip2")
QUICK = AllocationOptions(
    method="rtn", bits=(2, 3, 4), groups=(64,), probe=8, selection=12, evaluations=3, probe_bits=(2,)
)


def source(world: Path, task: str = "vqa", folder: str = "vqav2", samples: int = 6) -> CalibrationSource:
    found = CalibrationSource.parse([f"{task}:{world / folder}"], samples)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def run(small_world: Path) -> Callable[..., dict[str, Any]]:
    def call(out: Path, budget: str, options: AllocationOptions = QUICK, **more: Any) -> dict[str, Any]:
        data = small_world / "vqav2"
        return allocate(BLIP2, budget, "vqa", data, out, calibration=source(small_world), options=options, **more)

    return call


@pytest.fixture(scope="module")
def done(run: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("done") / "out"
    return out, run(out, "3.3bpw")


def weighed(recipe: Recipe | str, float_bits: int | None = 16) -> Any:
    model = load(BLIP2)
    quantize_model(model, recipe)
    return model_size(model, float_bits=float_bits)


def test_the_recipe_is_within_the_budget_and_better_than_uniform(done: tuple[Path, dict[str, Any]]) -> None:
    out, report = done
    recipe = Recipe.parse(out / "recipe.yaml")
    assert str(recipe) == report["recipe"]
    assert weighed(recipe).bpw == pytest.approx(report["cost"]["cost"], abs=1e-12)
    assert report["cost"]["cost"] <= 3.3
    assert report["uniform"]["why"] == "uniform 2bit:g64:asym"
    assert report["cost"]["loss"] < report["uniform"]["loss"]
    assert len(set(report["bits"].values())) > 1
    assert [one["why"] for one in report["shortlist"]].count("uniform 2bit:g64:asym") == 1
    assert all(one["cost"] <= 3.3 and one["inside"] for one in report["shortlist"])
    assert report["budget"]["smallest"] == pytest.approx(weighed("all=rtn:2:g64").bpw)


def test_the_report_says_what_was_measured(done: tuple[Path, dict[str, Any]]) -> None:
    out, report = done
    kept = json.loads((out / "allocation.json").read_text())
    assert {key: value for key, value in kept.items() if key != "request"} == {
        key: value for key, value in report.items() if key != "out"
    }
    assert report["samples"] == {"calibration": 6, "probe": 8, "selection": 12}
    assert report["loss"] == "nll"
    lead = report["lead"]["nll"]
    assert lead["value"] == pytest.approx(report["cost"]["metrics"]["nll"] - report["uniform"]["metrics"]["nll"])
    unsure = lead["high"] >= 0 and report["lead"]["accuracy"]["low"] <= 0
    assert any("not told apart" in note for note in report["notes"]) == unsure
    assert set(report["cost"]["metrics"]) == {"accuracy", "nll"}
    assert len(report["sensitivities"]) == len(report["bits"]) == 12
    for unit in report["sensitivities"]:
        errors = [unit["choices"][f"{bits}bit:g64:asym"]["output_error"] for bits in (2, 3, 4)]
        assert errors[0] > errors[1] > errors[2] > 0
        assert unit["choices"]["2bit:g64:asym"]["deviation"] > 0
        assert unit["choices"]["3bit:g64:asym"]["deviation"] is None


def test_a_killed_run_goes_on_and_ends_in_the_same(
    done: tuple[Path, dict[str, Any]], run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def until(number: int) -> Callable[[int, int, str], None]:
        calls = iter(range(number))

        def progress(done: int, total: int, what: str) -> None:
            if next(calls, None) is None:
                raise Killed

        return progress

    out = tmp_path / "out"
    for number in (20, 17):
        with pytest.raises(Killed):
            run(out, "3.3bpw", progress=until(number))
        assert not (out / "recipe.yaml").exists()
    assert len((out / "measurements.jsonl").read_text().splitlines()) >= 37
    report = run(out, "3.3bpw")
    volatile = ("seconds", "measured_now", "out")
    one, other = ({k: v for k, v in found.items() if k not in volatile} for found in (report, done[1]))
    assert one == other
    assert 0 < report["measured_now"] < done[1]["measured_now"]
    assert (out / "recipe.yaml").read_bytes() == (done[0] / "recipe.yaml").read_bytes()


def test_another_budget_shares_what_was_measured_and_not_the_folder(
    done: tuple[Path, dict[str, Any]], run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    out, before = done
    with pytest.raises(ValueError, match=r"holds another allocation \(budget 3\.3bpw\).*--measurements"):
        run(out, "3.2bpw")
    size = weighed("all=rtn:3:g64")
    others = size.memory_bytes - model_size(load(BLIP2)).memory_bytes
    budget = f"{size.weight_bits / 8 / 1e6 + 0.002:.6f}MB"
    report = run(tmp_path / "out", budget, measurements=out / "measurements.jsonl")
    assert others < 0 < report["measured_now"] < before["measured_now"] / 2
    assert report["budget"]["kind"] == "bytes"
    buffers = report["cost"]["cost"] - weighed(report["recipe"]).weight_bits / 8
    assert 0 <= buffers < 10_000
    assert report["cost"]["cost"] <= report["budget"]["value"]


def test_a_budget_in_milliseconds_holds_by_the_times_that_were_taken(
    run: Callable[..., dict[str, Any]], done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The timer says that a linear takes as long as its bits, a float model 200 ms: sums can be done by hand."""
    shapes: dict[int, float] = {}

    def timer(calls: Mapping[str, Callable[[int], object]], seconds: float, device: torch.device) -> Any:
        (call,) = calls.values()
        layers = next((cell.cell_contents for cell in call.__closure__ or () if _layers(cell.cell_contents)), None)
        if layers is None:
            return {"": {"us": 200_000.0}}
        layer = layers[0]
        call(0)
        bits = layer.spec.bits if isinstance(layer, QuantLinear) else 16
        shapes[bits] = shapes.get(bits, 0) + 1
        return {"": {"us": 100.0 * bits}}

    def _layers(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], torch.nn.Module)

    report = run(tmp_path / "out", "190ms", timer=timer, measurements=done[0] / "measurements.jsonl")
    assert set(shapes) == {2, 3, 4, 16}
    rest = report["budget"]["not_allocated"]
    assert rest == pytest.approx(200 - 0.1 * 16 * _calls(report, {}), rel=1e-3)
    bits = {unit: int(choice[0]) for unit, choice in report["bits"].items()}
    assert report["cost"]["cost"] == pytest.approx(rest + 0.1 * _calls(report, bits), rel=1e-3)
    assert report["cost"]["cost"] <= 190
    assert report["cost"]["measured_ms"] == 200
    with pytest.raises(
        BudgetError, match=r"budget 1ms cannot be met: the fastest of these widths take .*ms for a pass"
    ):
        run(tmp_path / "less", "1ms", timer=timer)
    with pytest.raises(ValueError, match="needs a timer"):
        run(tmp_path / "none", "1ms")


def _calls(report: dict[str, Any], bits: dict[str, int]) -> int:
    """Bits times linears: each is called once for a sample."""
    layers = {"vision_model": 4, "qformer": 10, "language_projection": 1, "language_model": 6}
    return sum(layers[unit.split(".")[0]] * bits.get(unit, 1) for unit in report["bits"])


def test_components_alone_and_one_width_each(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    options = replace(QUICK, per="component", components=("vision", "language"), dtype="fp32", evaluations=2)
    with pytest.raises(
        BudgetError, match=r"2bit:g64:asym everywhere takes .*bpw, of which .* at 32 bits .* --dtype fp16"
    ):
        run(tmp_path / "out", "4bpw", options)
    report = run(tmp_path / "out", "17bpw", replace(options, dtype=None))
    assert not any(unit.startswith("qformer") for unit in report["bits"])
    for part in ("vision_model", "language_model"):
        assert len({bits for unit, bits in report["bits"].items() if unit.startswith(part)}) == 1


def test_calibrated_methods_give_a_checkpoint(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    options = replace(QUICK, method="gptq", bits=(3, 4), evaluations=1, components=("connector",), probe_bits=())
    report = run(tmp_path / "out", "10.6bpw", options, checkpoint=tmp_path / "model")
    model = load(tmp_path / "model")
    specs = {name: m.spec.bits for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(specs) == 31
    for unit, choice in report["bits"].items():
        assert {bits for name, bits in specs.items() if name.startswith(unit)} == {int(choice[0])}
    assert report["disk_bytes"] > 0
    with pytest.raises(CheckpointError, match="not empty"):
        run(tmp_path / "again", "10.6bpw", options, checkpoint=tmp_path / "model")
    with pytest.raises(CheckpointError, match="is quantized already"):
        data = tmp_path
        allocate(tmp_path / "model", "4bpw", "vqa", data, tmp_path / "x", calibration=CalibrationSource(()))


def test_retrieval_is_ranked_by_divergence_and_recall(small_world: Path, tmp_path: Path) -> None:
    data = small_world / "flickr30k"
    options = replace(QUICK, evaluations=1, selection=6, probe=4)
    calibration = source(small_world, "retrieval", "flickr30k")
    report = allocate(
        weights_folder("blip2-itm"),
        "3.5bpw",
        "retrieval",
        data,
        tmp_path / "out",
        calibration=calibration,
        options=options,
    )
    assert report["loss"] == "divergence"
    assert {"text_r1", "image_r1"} <= set(report["cost"]["metrics"])
    assert 0 < report["cost"]["loss"] < report["uniform"]["loss"]
    assert any("task retrieval has no likelihood" in note for note in report["notes"])
    with pytest.raises(ModelMismatch, match="calibrated on task retrieval, got 'vqa'"):
        vqa = source(small_world)
        allocate(weights_folder("blip2-itm"), "3.5bpw", "vqa", small_world / "vqav2", tmp_path / "no", calibration=vqa)


def test_selection_shares_no_image_with_calibration(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"selection needs 500 samples .* neither calibration nor .* has \d+ of 48"):
        run(tmp_path / "out", "3.3bpw", replace(QUICK, selection=500))
    with pytest.raises(ValueError, match="selection must be at least 1, got 0"):
        run(tmp_path / "out", "3.3bpw", replace(QUICK, selection=0))
    assert not tmp_path.joinpath("out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "method must be one of .*, got 'magic'"),
        ({"method": "uniform", "groups": (64,)}, r"group of method uniform must be -1 .*, got \[64\]"),
        ({"evaluations": 0}, "evaluations must be at least 1, got 0"),
        ({"probe": 0}, "probe must be at least 1, got 0"),
        ({"bits": (1,)}, "bits must be an integer from 2 to 8, got 1"),
    ],
)
def test_options_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **change)
