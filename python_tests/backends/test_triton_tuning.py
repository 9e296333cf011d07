"""Which configuration a product gets, and the file that findings are kept in. No GPU, no Triton."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mmq_kernels.backends import RuntimeWeight, backend
from mmq_kernels.backends.triton import backend as module
from mmq_kernels.backends.triton import tuning
from mmq_kernels.backends.triton.configs import KNOWN, TOKEN_TILES, Config, candidates, default_config
from mmq_kernels.backends.triton.tuning import Findings, choose
from mmq_kernels.spec import QuantSpec

FOUND = Config(16, 32, 64, 2, 3, 1)
KEY = "4bit:g128:asym:float16:float16:m16:n64:k64"


@pytest.fixture
def findings(tmp_path) -> Findings:
    return Findings(tmp_path / "cache" / "gpu.json")


def timed(best: Config, calls: list[Config]) -> Callable[[Config], float]:
    def measure(config: Config) -> float:
        calls.append(config)
        return 1.0 if config == best else 2.0

    return measure


def test_a_known_gpu_is_not_tuned(findings) -> None:
    for arch, entry in KNOWN.items():
        for m in (1, 16, 17, 64, 257, 4096):
            tile = min(tile for tile in TOKEN_TILES if tile >= min(m, TOKEN_TILES[-1]))
            assert choose(arch, m, KEY, findings, timed(FOUND, [])) == entry[tile] and entry[tile].block_m == tile
    assert not findings.path.exists()


def test_an_unknown_gpu_is_tuned_once_and_remembered(findings) -> None:
    calls: list[Config] = []
    best = candidates("sm_75", 3)[4]
    assert choose("sm_75", 3, KEY, findings, timed(best, calls)) == best
    assert calls == candidates("sm_75", 3)
    assert choose("sm_75", 3, KEY, findings, timed(best, calls)) == best
    assert choose("sm_75", 3, KEY, Findings(findings.path), timed(best, calls)) == best, "in another process"
    assert len(calls) == len(candidates("sm_75", 3))


def test_nothing_is_measured_while_a_graph_is_captured(findings) -> None:
    assert choose("sm_75", 3, KEY, findings, None) == default_config("sm_75", 3)
    assert not findings.path.exists()
    best = candidates("sm_75", 3)[2]
    choose("sm_75", 3, KEY, findings, timed(best, []))
    assert choose("sm_75", 3, KEY, findings, None) == best, "what is known serves in a capture too"


def test_the_backend_measures_on_unknown_gpus_but_not_in_a_capture(findings, monkeypatch) -> None:
    """What `TritonBackend.gemm` asks for its configuration, on a machine whose GPU the table does not know."""
    triton = backend("triton")
    unknown = SimpleNamespace(arch="sm_75", name="Imaginary", multiprocessors=40, findings=findings)
    launched: list[Config] = []
    monkeypatch.setattr(module, "_machine", lambda device: unknown)
    monkeypatch.setattr(module, "_measured", lambda launch: lambda config: launch(config) or config.block_n)
    runtime = triton.runtime_shapes(QuantSpec(4, 32), 64, 128)
    weight = RuntimeWeight(*(torch.zeros(shape, dtype=torch.int32) for shape in runtime))
    x = torch.zeros(3, 128, dtype=torch.float16)
    monkeypatch.setattr(module, "_capturing", lambda device: True)
    assert triton.config(x, weight, QuantSpec(4, 32), 64, launched.append) == default_config("sm_75", 3)
    assert not launched and not findings.path.exists()
    monkeypatch.setattr(module, "_capturing", lambda device: False)
    found = triton.config(x, weight, QuantSpec(4, 32), 64, launched.append)
    assert launched == candidates("sm_75", 3) and found.block_n == min(config.block_n for config in launched)
    assert list(json.loads(findings.path.read_text())) == ["4bit:g32:asym:float16:int32:m16:n64:k128"]
    for other in (torch.zeros(20, 128, dtype=torch.float16), x.bfloat16()):
        launched.clear()
        triton.config(other, weight, QuantSpec(4, 32), 64, launched.append)
        assert launched, "another number of tokens or dtype is measured by itself"


def test_what_the_environment_asks_for(findings, monkeypatch) -> None:
    best, calls = candidates("sm_90", 3)[3], []
    monkeypatch.setenv("MMQ_TRITON_TUNE", "on")
    assert choose("sm_90", 3, KEY, findings, timed(best, calls)) == best and calls
    monkeypatch.setenv("MMQ_TRITON_TUNE", "off")
    assert choose("sm_90", 3, KEY, findings, timed(best, [])) == default_config("sm_90", 3)
    assert choose("sm_75", 3, KEY, findings, timed(best, [])) == default_config("sm_75", 3)
    monkeypatch.setenv("MMQ_TRITON_TUNE", "maybe")
    with pytest.raises(ValueError, match=r"MMQ_TRITON_TUNE must be one of auto, on, off, got 'maybe'"):
        choose("sm_90", 3, KEY, findings, None)


def test_configurations_that_do_not_run_are_passed_over(findings) -> None:
    def measure(config: Config) -> float:
        if config.block_n > 64:
            raise RuntimeError("out of resource: shared memory")
        return config.block_k

    found = choose("sm_75", 3, KEY, findings, measure)
    assert found.block_n <= 64 and found.block_k == min(c.block_k for c in candidates("sm_75", 3) if c.block_n <= 64)

    def none_runs(config: Config) -> float:
        raise RuntimeError("out of resource")

    assert choose("sm_75", 99, "other", findings, none_runs) == default_config("sm_75", 99)
    assert "other" not in json.loads(findings.path.read_text())


DAMAGED = {
    "not JSON": "{",
    "not a table": "[1, 2]",
    "another shape": '{"key": [1, 2, 3]}',
    "not a configuration": '{"key": [16, 64, 100, 4, 4, 4]}',
    "not numbers": '{"key": ["a", "b", "c", "d", "e", "f"]}',
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_left_out_with_one_warning_and_replaced(content, findings) -> None:
    findings.path.parent.mkdir()
    findings.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="configurations of Triton kernels cannot be read") as caught:
        assert findings.get(KEY) is None and findings.get("another") is None
        findings.put(KEY, FOUND)
    assert len(caught) == 1 and str(findings.path) in str(caught[0].message)
    assert Findings(findings.path).get(KEY) == FOUND


def test_a_place_that_cannot_be_written_is_left_out_with_one_warning(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    findings = Findings(tmp_path / "file" / "gpu.json")
    with pytest.warns(UserWarning, match=r"cannot be .*written|cannot be read") as caught:
        findings.put(KEY, FOUND)
        findings.put("another", FOUND)
        assert findings.get(KEY) == findings.get("another") == FOUND, "kept in memory"
    assert len(caught) == 1


def test_a_lock_that_nobody_gives_back_is_not_waited_for_for_ever(findings, monkeypatch) -> None:
    from filelock import FileLock

    findings.path.parent.mkdir()
    monkeypatch.setattr(tuning, "LOCK_SECONDS", 0.05)
    with FileLock(f"{findings.path}.lock"), pytest.warns(UserWarning, match="cannot be written"):
        findings.put(KEY, FOUND)
    assert findings.get(KEY) == FOUND and not findings.path.exists()


WRITER = """
import sys, warnings
from pathlib import Path
from mmq_kernels.backends.triton.configs import Config
from mmq_kernels.backends.triton.tuning import Findings
warnings.simplefilter("error")
path, me = Path(sys.argv[1]), int(sys.argv[2])
for i in range(40):
    Findings(path).put(f"{me}:{i}", Config(16, 64, 128, 4, me, i + 1))
"""


def test_two_processes_that_tune_at_once_lose_nothing(findings) -> None:
    command = [sys.executable, "-c", WRITER, str(findings.path)]
    running = [subprocess.Popen([*command, str(me)]) for me in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(process.poll() is None for process in running):
            Findings(findings.path).get("1:0")  # never half of a file
    assert [process.returncode for process in running] == [0, 0]
    kept = Findings(findings.path)
    for me in (1, 2):
        assert all(kept.get(f"{me}:{i}") == Config(16, 64, 128, 4, me, i + 1) for i in range(40))
    assert sorted(path.name for path in findings.path.parent.iterdir() if path.suffix != ".lock") == ["gpu.json"]


def test_a_file_belongs_to_one_gpu_and_one_version(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MMQ_CACHE_DIR", str(tmp_path))
    paths = {tuning.cache_file(gpu, version) for gpu in ("NVIDIA L4", "NVIDIA T4") for version in ("3.4.0", "3.9.0")}
    assert len(paths) == 4 and all(path.parent == tmp_path and " " not in path.name for path in paths)


def test_bad_configurations_are_refused_by_name() -> None:
    for values, message in (
        ((16, 64, 128, 4, 4, 0), "waves must be a positive integer, got 0"),
        ((16, 64, 100, 4, 4, 4), "block_k must be a power of two, got 100"),
        ((8, 64, 128, 4, 4, 4), "blocks must be at least 16, got 8 x 64 x 128"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(*values)


def test_shares_of_k_fill_the_gpu_and_are_never_empty() -> None:
    config = Config(16, 64, 128, 4, 4, 4)
    assert config.splits(1, 8192, 8192, 132) == 4  # 128 tiles, 528 programs wanted
    assert config.splits(4096, 8192, 8192, 132) == 1
    assert config.splits(1, 64, 256, 132) == 1, "too few steps"
    for n in (64, 1000, 4096):
        for k in (300, 1408, 6144, 11008):
            splits, steps = config.splits(1, n, k, 132), -(-k // 128)
            assert (splits - 1) * -(-steps // splits) < steps


def test_scales_multiply_sums_up_to_64_tokens() -> None:
    few, many = Config(16, 64, 128, 4, 4, 4), Config(128, 128, 64, 8, 3, 1)
    assert few.fitted(QuantSpec(4, -1), 4096, False) == (few, "row")
    assert few.fitted(QuantSpec(4, 4096), 4096, False) == (few, "row")
    assert few.fitted(QuantSpec(4, 128), 4096, False) == (few, "after")
    assert few.fitted(QuantSpec(4, 32), 4096, False) == (Config(16, 64, 32, 4, 4, 4), "after")
    assert few.fitted(QuantSpec(4, 24), 4096, False) == (few, "word")
    assert few.fitted(QuantSpec(3, 24), 4096, False) == (few, "pair")
    assert many.fitted(QuantSpec(4, 128), 4096, False) == (many, "tile")
    assert many.fitted(QuantSpec(4, 128), 4096, True) == (many, "after")
    assert many.fitted(QuantSpec(4, 32), 4096, False) == (many, "word")
