"""Runs of GPTQ that are killed between blocks, and what becomes of them."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_vlms
import torch

from mmq_kernels.checkpoint import quantize_checkpoint, save
from mmq_kernels.checkpoint.partial import PartialRun

RECIPE = "vision=gptq:4:g16 connector=gptq:3:channel language=gptq:2:g16"

SCRIPT = """
import sys, time
import tiny_vlms
import torch
from mmq_kernels.checkpoint import quantization
from mmq_kernels.checkpoint.partial import PartialRun

class Data:
    def fingerprint(self):
        return "the same"
    def batches(self, model, processor):
        return tiny_vlms.batches(model)

quantization.load_processor = lambda source: None
slow = float(sys.argv[3])
whole = PartialRun.save
def save(self, *arguments):
    whole(self, *arguments)
    time.sleep(slow)
PartialRun.save = save
torch.set_num_threads(1)
quantization.quantize_checkpoint(sys.argv[1], sys.argv[4], sys.argv[2], calibration=Data(), resume="resume" in sys.argv)
"""


def _start(source: Path, out: Path, *more: str, slow: float = 0.0, recipe: str = RECIPE) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(tiny_vlms.__file__).parent)}
    arguments = [sys.executable, "-c", SCRIPT, str(source), str(out), str(slow), recipe, *more]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def _finished(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vlms.make("opt"), tmp_path_factory.mktemp("resume") / "source")


@pytest.mark.parametrize("recipe", [RECIPE, "vision=awq:3:g16 language=awq:3:g16"], ids=["gptq", "folded awq"])
def test_a_killed_run_resumes_to_the_same_bits(recipe: str, source: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    _finished(_start(source, undisturbed, recipe=recipe))
    partial = tmp_path / "killed.partial"
    seen = 0
    for _ in range(2):  # killed twice, each time behind at least one more block
        process = _start(source, killed, "resume", slow=1.0, recipe=recipe)
        deadline = time.monotonic() + 120
        while len(list(partial.glob("*.safetensors"))) <= seen and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not killed.exists()
        seen = len(list(partial.glob("*.safetensors")))
    blocks = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(blocks) >= 2
    process = _start(source, killed, "resume", slow=0.2, recipe=recipe)
    while process.poll() is None and not killed.exists():
        for name, written in blocks.items():  # what was finished is not done again
            path = partial / name
            if path.exists():
                assert path.stat().st_mtime_ns == written
        time.sleep(0.05)
    _finished(process)
    assert _digests(killed) == _digests(undisturbed)
    assert not partial.exists()


def test_a_run_left_behind_is_not_mixed_with_another(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(source, out, slow=30.0)
    while not list((tmp_path / "out.partial").glob("*.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    _, errors = _start(source, out).communicate(timeout=240)
    assert "holds an unfinished run; go on with --resume, or delete it" in errors
    _, errors = _start(source, out, "resume", recipe="vision=gptq:3:g16").communicate(timeout=240)
    assert "was started with recipe" in errors
    assert not out.exists()


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    run = PartialRun(tmp_path / "out", {"model": "a"}, resume=False)
    assert run.load("vision 0") is None
    layers = {"a.b": {"weight_packed": torch.arange(6, dtype=torch.int32), "weight_scale": torch.rand(2).half()}}
    run.save("vision 0", layers, [])
    again = PartialRun(tmp_path / "out", {"model": "a"}, resume=True)
    assert again.finished == 1
    loaded = again.load("vision 0")
    assert loaded is not None
    for name, tensor in layers["a.b"].items():
        assert torch.equal(loaded[0]["a.b"][name], tensor)
    again.remove()
    assert not list(tmp_path.iterdir())


def test_every_parameter_keeps_its_stored_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may mix dtypes, as BLIP-2's does: half precision, and a Q-Former in fp32."""
    from safetensors.torch import load_file

    from mmq_kernels.checkpoint import quantization

    model = tiny_vlms.make("opt", torch.float16)
    model.qformer.float()
    model.query_tokens.data = model.query_tokens.data.float()
    folder = save(model, tmp_path / "source")

    class Data:
        def fingerprint(self) -> str:
            return "any"

        def batches(self, model: object, processor: object) -> list[dict[str, object]]:
            return tiny_vlms.batches(model)

    monkeypatch.setattr(quantization, "load_processor", lambda source: None)
    quantize_checkpoint(folder, "vision=gptq:4:g16", tmp_path / "out", calibration=Data())
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    kept = set(before) & set(after)
    assert {before[name].dtype for name in kept} == {torch.float16, torch.float32}
    for name in kept:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name], before[name]), name
