"""The README's GPU table holds what was measured, and says so where nothing was."""

import importlib
import json
import types
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
NOT_MEASURED = "not measured: no GPU has run this commit."


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("tables")
    monkeypatch.setattr(importlib.import_module("recorded"), "RESULTS", tmp_path)
    return module


def row(bits: int, m: int, ratio: float, **other: object) -> dict[str, object]:
    measured = {"bench": "gemm", "n": 8192, "k": 8192, "group": 128, "activation": "none", "dtype": "fp16"}
    machine = {"gpu": "NVIDIA H200", "driver": "570.1", "cuda": "12.8", "torch": "2.13.0", "commit": "abc1234"}
    return measured | machine | {"bits": bits, "m": m, "x_torch_fp16": ratio, "command": "c", "date": "d"} | other


def write(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells(text: str, bits: int, name: str = "") -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {bits} bits{name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_nothing_measured_is_an_empty_table(tables: types.ModuleType) -> None:
    text = tables.gpu()
    assert all(cells(text, bits) == [""] * 6 for bits in (8, 4, 3, 2))
    assert NOT_MEASURED in text


def test_cells_come_from_the_last_run_alone(tables: types.ModuleType, tmp_path: Path) -> None:
    older = [row(bits, m, 9.0, commit="0000000") for bits in tables.GPU_BITS for m in tables.GPU_TOKENS]
    others: list[dict[str, object]] = [row(4, 16, 8.0, n=4096), row(4, 16, 8.0, activation="gelu"), {"bench": "gptq"}]
    write(tmp_path, [*older, *others, row(4, 1, 1.5), row(4, 1, 2.345), row(2, 4096, 1.0)])
    text = tables.gpu()
    assert cells(text, 4) == ["2.35x" if m == 1 else "" for m in tables.GPU_TOKENS]
    assert cells(text, 2)[-1] == "1.00x"
    assert NOT_MEASURED in text
    assert "`c` on NVIDIA H200, driver 570.1, CUDA 12.8, torch 2.13.0, at abc1234." in text


def test_a_full_table_misses_nothing(tables: types.ModuleType, tmp_path: Path) -> None:
    rows = [row(bits, m, 2.0) for bits in tables.GPU_BITS for m in tables.GPU_TOKENS]
    write(tmp_path, rows)
    assert NOT_MEASURED in tables.gpu()
    beside = {"triton/packed_us": 1.0, "triton/packed_x_torch_fp16": 1.5, "triton/dense_x_torch_fp16": 0.9}
    write(tmp_path, [line | beside for line in rows])
    text = tables.gpu()
    assert all(cells(text, bits) == ["2.00x"] * 6 for bits in (8, 4, 3, 2))
    assert all(cells(text, bits, ", Triton alone") == ["1.50x"] * 6 for bits in (8, 4, 3, 2))
    assert NOT_MEASURED not in text
