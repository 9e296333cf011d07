"""`make gpu`: what it would run on a machine with a GPU, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    """The script, on a machine that says it has an H200."""
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return module


def test_every_step_has_a_command(gpu, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu, "sanitizer", lambda: "/opt/compute-sanitizer")
    parts = gpu.commands(tmp_path, list(gpu.STEPS), full=False)
    assert list(parts) == ["build", "test", "ops", *gpu.TOOLS, "bench"]
    assert parts["build"][1]["MMQ_CUDA_ARCHS"] == "90a"
    for tool in gpu.TOOLS:
        command = parts[tool][0]
        assert command[:3] == ["/opt/compute-sanitizer", "--tool", tool] and "--error-exitcode" in command
    assert str(tmp_path / "gpu.jsonl") in parts["bench"][0]


def test_other_gpus_are_named_by_their_capability(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert gpu.architecture() == "120"


def test_results_of_each_step_are_kept(gpu, monkeypatch, tmp_path, capsys) -> None:
    good = [sys.executable, "-c", "print('======= 7 passed, 2 skipped in 1.00s =======')"]
    bad = [sys.executable, "-c", "print('no such kernel'); raise SystemExit(3)"]
    monkeypatch.setattr(gpu, "commands", lambda out, steps, full: {"test": (good, {}), "bench": (bad, {})})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--steps", "test,bench"])
    assert gpu.main() == 1
    lines = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert [line["exit_code"] for line in lines] == [0, 3]
    assert lines[0]["found"] == ["7 passed, 2 skipped in 1.00s"] and lines[0]["gpu"] == "NVIDIA H200"
    assert "no such kernel" in (tmp_path / "bench.log").read_text()
    assert "no such kernel" in capsys.readouterr().out


def test_wrong_steps_and_no_gpu_are_said(gpu, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--steps", "build,paint"])
    with pytest.raises(SystemExit):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        gpu.main()
