"""What is missing is explained and replaced: no extension, no Triton, neither; and the pure-Python wheel by itself."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TRITON = importlib.util.find_spec("triton") is not None

SCRIPT = """
import json, sys
for name in sys.argv[2].split():
    sys.modules[name] = None  # as if it had never been installed
import torch
import mmq_kernels
from mmq_kernels import ops
from mmq_kernels.cli.app import run
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

draw = torch.Generator().manual_seed(0)
weight, x, bias = (torch.randn(shape, generator=draw) for shape in ((9, 70), (4, 70), (9,)))
spec = QuantSpec(3, 32)
codes, scale, zero = ops.quantize_rtn(weight, spec)
layer = QuantLinear.from_codes(codes, scale, zero, spec, bias=bias, activation="gelu")
hinv = torch.eye(70) + 0.01 * torch.rand(70, 70, generator=draw).triu(1)
gptq = ops.gptq_block(weight, hinv, None, None, spec)
assert torch.equal(ops.unpack(ops.pack(codes, 3), 3, 70), codes)
results = {
    "file": mmq_kernels.__file__,
    "explain": mmq_kernels.explain(layer),
    "codes": codes.tolist(),
    "scale": scale.tolist(),
    "gptq": gptq[0].tolist(),
    "dense": layer.dequantize().tolist(),
    "y": layer(x).tolist(),
    "half": layer(x.bfloat16()).tolist(),
}
with open(sys.argv[1], "w") as file:
    json.dump(results, file)
sys.exit(run(["info", "--json"]))
"""


def outcome(
    folder: Path, missing: str, python: str = sys.executable, cwd: Path = ROOT, **environment: str
) -> tuple[dict, dict]:
    """What the script computed, and what `mmq info` said, in a process where modules are missing."""
    out = folder / f"{len(list(folder.iterdir()))}.json"
    done = subprocess.run(
        [python, "-c", SCRIPT, str(out), missing],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), json.loads(done.stdout)


def assert_agree(a: dict, b: dict) -> None:
    """Codes, scales and weights are equal; products up to the order of sums."""
    for exact in ("codes", "scale", "gptq", "dense"):
        assert a[exact] == b[exact], exact
    torch.testing.assert_close(torch.tensor(a["y"]), torch.tensor(b["y"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(a["half"]), torch.tensor(b["half"]), rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> dict:
    """What the script computes where nothing is missing."""
    return outcome(tmp_path_factory.mktemp("everything"), "")[0]


@pytest.mark.parametrize("missing", ["mmq_kernels._C", "triton", "mmq_kernels._C triton"])
def test_what_is_missing_is_explained_and_replaced(missing, everything, tmp_path) -> None:
    results, facts = outcome(tmp_path, missing)
    assert_agree(results, everything)
    extension, backends = facts["extension"], facts["backends"]
    if "_C" in missing:
        assert extension["available"] is False and "MMQ_BUILD=none" in backends["cpu"]["why_not"]
        assert results["explain"].startswith("reference: ")
        assert "cpu: the compiled extension is not installed" in results["explain"]
    if "triton" in missing:
        assert facts["triton"] is None and backends["triton"]["why_not"] == "triton is not installed"
        assert "triton: triton is not installed" in results["explain"]
    assert backends["reference"]["available"]


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_triton_alone_agrees_with_the_others(everything, tmp_path) -> None:
    results, facts = outcome(tmp_path, "mmq_kernels._C", MMQ_BACKEND="triton", TRITON_INTERPRET="1")
    assert results["explain"].startswith("triton/packed: asked for") and facts["forced_backend"] == "triton"
    assert_agree(results, everything)


def test_a_forced_backend_that_is_missing_raises() -> None:
    script = SCRIPT.split("draw = ")[0] + (
        "weight = torch.randn(4, 64)\n"
        "try:\n    ops.quantize_rtn(weight, QuantSpec(4, 32))\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    for forced, missing, reason in (
        ("cpu", "mmq_kernels._C", "the compiled extension is not installed"),
        ("triton", "triton", "triton is not installed"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, "", missing],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={"PATH": "", "MMQ_BACKEND": forced},
        )
        expected = f"backend '{forced}' was asked for but cannot serve mmq.quantize_rtn on cpu: {forced}: {reason}"
        assert expected in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def pure(tmp_path_factory) -> Path:
    """Python of a new environment that holds the pure-Python wheel; dependencies are seen, this tree is not."""
    folder = tmp_path_factory.mktemp("pure")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("mmq_kernels", "csrc"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    environment = os.environ | {"MMQ_BUILD": "none"}
    done = subprocess.run([*build, str(sources)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    here = Path(torch.__file__).parents[1]
    (packages / "dependencies.pth").write_text(f"{here}\n")  # a plain path: this tree's editable hook stays out
    return python


def test_the_pure_python_wheel_works_by_itself(pure, everything, tmp_path) -> None:
    for environment in ({}, {"MMQ_BACKEND": "triton", "TRITON_INTERPRET": "1"} if TRITON else {}):
        results, facts = outcome(tmp_path, "", str(pure), tmp_path, **environment)
        assert Path(results["file"]).is_relative_to(pure.parents[1]), "the wheel, not the sources"
        assert facts["extension"]["available"] is False
        assert_agree(results, everything)


def test_the_pure_python_wheel_quantizes_and_captions(pure, tmp_path) -> None:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(pure.with_name("mmq")), "info"], capture_output=True, text=True, timeout=200, check=False, env=alone
    )
    assert done.returncode == 0 and "MMQ_BUILD=none" in done.stdout, done.stdout + done.stderr
    script = """
import torch
from mmq_kernels import load, load_processor, quantize_model
from mmq_kernels.demo import weights_folder
folder = weights_folder("blip2")
model, processor = load(folder), load_processor(folder)
quantize_model(model, "vision=rtn:4:g64 language=rtn:4:g64")
inputs = processor(images=torch.zeros(3, 64, 64, dtype=torch.uint8).numpy(), return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=20)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
"""
    done = subprocess.run(
        [str(pure), "-c", script], capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path, env=alone
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 3, done.stdout
