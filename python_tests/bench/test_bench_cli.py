"""`mmq bench` and what it writes: JSON lines, a table, a roofline; and one line for every bad value."""

import json
import re
from pathlib import Path

import pytest

from mmq_kernels.bench.record import append, provenance, read
from mmq_kernels.bench.roofline import figure, last_run, write_roofline
from mmq_kernels.cli.app import run

GEMM = ["bench", "gemm", "--quick", "--device", "cpu", "--shapes", "40x72", "--groups", "-1,32", "--tokens", "1,3"]


def test_quick_run_appends_valid_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    arguments = [*GEMM, "--bits", "3", "--out", str(out), "--roofline", str(tmp_path / "roofline.html")]
    assert run(arguments) == 0
    assert run(arguments) == 0
    rows = read(out)
    assert len(rows) == 8
    for row in rows:
        assert row["x_torch_fp32"] == row["torch_fp32_us"] / row["us"]
        assert (row["n"], row["k"], row["bits"]) == (40, 72, 3)
        assert row.keys() >= {"cpu", "threads", "torch", "commit", "command", "date", "kernel"}
    assert [(row["group"], row["m"]) for row in rows[:4]] == [(-1, 1), (-1, 3), (32, 1), (32, 3)]
    shown = capsys.readouterr().out
    for heading in ("shape", "TFLOP/s", "GB/s", "x torch", "share of limit", "40x72 3 bits channel"):
        assert heading in shown
    assert (tmp_path / "roofline.html").is_file()


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GEMM, "--bits", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == 4
    assert printed["about"]["torch"]


def test_every_suite_runs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "gptq", "blocks", "decode", "--quick", "--device", "cpu", "--bits", "4", "--seconds", "0.001"]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    for subject in ("gptq 256x256 4 bits", "vision block", "qformer block", "language block", "32 tokens 4 bits"):
        assert subject in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gem"], r"SUITE must be one of gemm, gptq, blocks, decode, demo, threads, got 'gem'"),
        (["--bits", "4,9"], r"--bits must be integers from 2 to 8 with commas between them, got '4,9'"),
        (["--bits", "four"], r"--bits must be integers from 2 to 8 with commas between them, got 'four'"),
        (["--groups", "12"], r"--groups must be integers that are -1 or positive multiples of 8 .*, got '12'"),
        (["--tokens", "0"], r"--tokens must be integers of at least 1 with commas between them, got '0'"),
        (["--shapes", "vat"], r"--shapes: a shape must be NxK, one of vit, .*, got 'vat'"),
        (["--dtype", "fp8"], r"--dtype must be one of fp32, fp16, bf16, got 'fp8'"),
        (["--seconds", "0"], r"--seconds must be positive, got 0.0"),
        (["--device", "tpu9"], r"device must be cpu, cuda or cuda:N, got 'tpu9'"),
        (["--beside", "tpu"], r"backend must be one of cuda, triton, cpu, reference, got 'tpu'"),
        (["gptq", "--roofline", "x.html"], r"--roofline must go with the suite gemm, got gptq"),
    ],
)
def test_bad_values_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "--quick", *arguments]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"mmq: {message}", said.strip())
    assert not list(tmp_path.iterdir())


def row(bits: int, m: int, us: float, gb_per_s: float = 100.0) -> dict:
    n = k = 1000
    tflops = 2 * m * n * k / us / 1e6
    known = {"bench": "gemm", "shape": "a", "bits": bits, "m": m, "n": n, "k": k, "group": 128, "dtype": "fp16"}
    measured = {"us": us, "tflops": tflops, "bytes": n * k * bits // 8, "x_torch_fp16": 2.0, "share_of_limit": 0.5}
    return known | measured | {"read_gb_per_s": gb_per_s, "matmul_tflops": 5.0, "kernel": "cuda: preferred"}


def test_roofline_is_self_contained(tmp_path: Path) -> None:
    results, page = tmp_path / "rows.jsonl", tmp_path / "roofline.html"
    append(results, [row(4, 1, 20), row(8, 16, 40), {"bench": "gptq"}])
    write_roofline(read(results), page)
    html = page.read_text()
    assert "Plotly.newPlot" in html
    assert not re.search(r"<script[^>]+src=|<link\b|@import", html)
    assert len(html) > 1_000_000  # plotly itself
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_roofline_draws_the_last_run_under_its_own_limits() -> None:
    older, newer = row(4, 1, 20, gb_per_s=90.0), [row(4, 1, 20), row(4, 64, 50), row(8, 1, 30)]
    assert last_run([older, *newer]) == newer
    limit, four, eight = figure(newer).data
    assert (four.name, eight.name) == ("4 bits", "8 bits")
    assert list(four.x) == [4, 256]  # 2 operations for each half byte of a weight, 64 times that
    assert list(four.y) == pytest.approx([0.1, 2.56])
    assert limit.x[1] == 50  # 5 TFLOP/s at 100 GB/s
    assert list(limit.y) == pytest.approx([0.1, 5, 5])  # from half the lowest of 2 operations a byte
    with pytest.raises(ValueError, match="rows for a roofline must hold one of the suite gemm, got 1 without"):
        last_run([{"bench": "gptq"}])


def test_damaged_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(ValueError, match=r"every line of .*rows.jsonl must be a JSON object, got '.*' in line 2"):
        read(path)


def test_provenance_names_machine_and_versions() -> None:
    about = provenance()
    assert about.keys() >= {"cpu", "threads", "isa", "compiler", "torch", "transformers", "python", "commit", "command"}
    json.dumps(about)
