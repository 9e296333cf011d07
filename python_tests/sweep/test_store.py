"""The results database: rows go in once, several processes write at once, damage and other versions are named."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmq_kernels.sweep import Result, Store, StoreError, fingerprint


def made(index: int, **changes: object) -> Result:
    values = {
        "fingerprint": fingerprint(index=index),
        "model": "blip2",
        "task": "vqa",
        "method": "gptq",
        "factors": {"vision": 4, "kind": "mlp"},
        "metrics": {"accuracy": index / 7},
        "intervals": {"accuracy": (0.1, 0.9)},
        "samples": 300,
        "data": "data/vqav2",
        "recipe": "vision=gptq:4",
        "bpw": 4.25,
        "bytes": 10**12,
        "latency": 0.1,
        "seconds": 3.5,
        "seed": index,
        "versions": {"torch": "2.13"},
        "settings": {"gptq": {"damping": 0.01}},
    }
    return Result(**(values | changes))  # type: ignore[arg-type]


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    results = [made(1), made(2, bpw=None, bytes=None, latency=None, seconds=None, seed=None, task="caption")]
    with Store(tmp_path / "results.db") as store:
        assert store.add(results) == 2
    with Store(tmp_path / "results.db", existing=True) as store:
        assert sorted(store.results(), key=lambda result: result.task) == sorted(results, key=lambda r: r.task)
        assert store.results(task="caption") == [results[1]]
        assert store.results(task="vqa", method="awq") == []
        assert store.values("task") == ["caption", "vqa"]
        assert results[0].fingerprint in store and "f00" not in store


def test_a_row_is_never_doubled_nor_replaced(tmp_path: Path) -> None:
    with Store(tmp_path / "results.db") as store:
        assert store.add([made(1), made(1)]) == 1
        assert store.add([made(1, metrics={"accuracy": 0.0}), made(2)]) == 1
        assert len(store) == 2
        assert {result.metrics["accuracy"] for result in store.results()} == {1 / 7, 2 / 7}


def test_a_batch_goes_in_whole_or_not_at_all(tmp_path: Path) -> None:
    with Store(tmp_path / "results.db") as store:
        with pytest.raises(ValueError, match=r"metrics of .* must be finite, got .*nan"):
            store.add([made(1), made(2, metrics={"accuracy": float("nan")})])
        with pytest.raises(sqlite3.IntegrityError):
            store.add([made(1), made(2, model=None)])
        assert len(store) == 0


def test_fingerprints_follow_the_facts() -> None:
    assert fingerprint(a=1, b=[1, 2]) == fingerprint(b=[1, 2], a=1)
    assert fingerprint(a=1) != fingerprint(a=2)
    with pytest.raises(ValueError):
        fingerprint(a=float("nan"))


def test_files_that_are_something_else_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no results database .*missing.db"):
        Store(tmp_path / "missing.db", existing=True)
    assert not (tmp_path / "missing.db").exists()
    with pytest.raises(StoreError, match=r"no folder .*nowhere"):
        Store(tmp_path / "nowhere" / "results.db")
    (tmp_path / "text.db").write_text("not a database at all, but long enough to be taken for a header\n" * 20)
    before = (tmp_path / "text.db").read_bytes()
    with pytest.raises(StoreError, match=r"text.db is no results database: file is not a database"):
        Store(tmp_path / "text.db")
    assert (tmp_path / "text.db").read_bytes() == before
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("create table mine (x)")
    with pytest.raises(StoreError, match=r"other.db is a database, but none of results"):
        Store(tmp_path / "other.db")


def test_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with Store(path) as store:
        store.add([made(1)])
    with sqlite3.connect(path) as raw:
        raw.execute("pragma user_version = 7")
    with pytest.raises(StoreError, match=r"results.db is a results database of version 7; this package has 3"):
        Store(path)


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from mmq_kernels.sweep import Store
from test_store import made
first = int(sys.argv[2])
with Store(sys.argv[1]) as store:
    for index in range(first, first + 300):
        store.add([made(index)])
        print(index, flush=True)
"""


def start(path: Path, first: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(path), str(first), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def test_processes_write_at_once_and_kills_lose_nothing(tmp_path: Path) -> None:
    """Three writers whose rows overlap; one is killed in the middle of its writing."""
    path = tmp_path / "results.db"
    writers = [start(path, first) for first in (0, 150, 1000)]
    killed = writers[2]
    assert killed.stdout is not None
    for line in killed.stdout:
        if int(line) >= 1020:
            break
    time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    said = [writer.communicate(timeout=120)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, -signal.SIGKILL]
    written = 1020 if not said[2].split() else int(said[2].split()[-1])
    with Store(path, existing=True) as store:
        there = {result.seed for result in store.results()}
    assert there >= set(range(450)) | set(range(1000, written + 1))
    assert len(there) <= 450 + written + 2 - 1000
