"""Whatever happens to a sweep, its table is that of an undisturbed one: kills, a second sweep, lost workers, Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmq_kernels.sweep import Grid, Machine, Result, Store, Summary, Sweep

ONE_THREAD = Machine(threads=1)
ROWS = 16


def run(grid: Grid, path: Path, **options: Any) -> Summary:
    with Store(path) as store:
        return Sweep(grid, grid.configurations()).run(store, machine=ONE_THREAD, **options)


def table(path: Path) -> dict[str, tuple[Result, str]]:
    """Rows but for times, with their predictions."""
    with Store(path, existing=True) as store:
        return {
            row.fingerprint: (replace(row, latency=None, seconds=None), store.predictions(row.fingerprint).read_text())
            for row in store.results()
        }


@pytest.fixture(scope="module")
def grid(content: dict[str, Any]) -> Grid:
    return Grid.of(content)


@pytest.fixture(scope="module")
def undisturbed(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Result, str]]:
    path, threads = tmp_path_factory.mktemp("undisturbed") / "results.db", torch.get_num_threads()
    done = run(grid, path)
    torch.set_num_threads(threads)
    assert (done.made, done.there, done.failed) == (ROWS, 0, {})
    return table(path)


def start(content: dict[str, Any], folder: Path, path: Path) -> subprocess.Popen[str]:
    (folder / "grid.json").write_text(json.dumps(content))
    command = [sys.executable, "-m", "mmq_kernels", "sweep", str(folder / "grid.json"), "-o", str(path), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, text=True, env=environment)


def wait_for_rows(path: Path, least: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.is_file():
            with Store(path) as store:
                if len(store) >= least:
                    return
        time.sleep(0.02)
    raise AssertionError(f"fewer than {least} rows after {seconds} s")


def test_a_killed_sweep_goes_on_beside_another(
    content: dict[str, Any], grid: Grid, undisturbed: dict[str, tuple[Result, str]], tmp_path: Path
) -> None:
    path = tmp_path / "results.db"
    killed = start(content, tmp_path, path)
    wait_for_rows(path, 3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    there = table(path)
    assert 3 <= len(there) < ROWS and there.items() <= undisturbed.items()
    beside = start(content, tmp_path, path)
    wait_for_rows(path, len(there) + 1)
    done = run(grid, path)
    said = json.loads(beside.communicate(timeout=120)[0])
    assert beside.returncode == 0 and said["rows"] == ROWS
    assert table(path) == undisturbed
    assert len(there) + said["made"] + done.made == ROWS, "each row was made once"
    assert run(grid, path).there == ROWS


def test_rows_of_ray_are_those_of_one_process_though_a_worker_is_killed(
    grid: Grid, undisturbed: dict[str, tuple[Result, str]], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    from mmq_kernels.sweep.engines.ray import OnRay

    killed: list[int] = []

    def progress(done: int, total: int, what: str) -> None:
        if done >= 3 and not killed:
            killed.append(busy_worker())
            os.kill(killed[0], signal.SIGKILL)

    done = run(grid, tmp_path / "results.db", engine=OnRay(workers_asked=2, retries=1), progress=progress)
    assert killed and (done.made, done.failed) == (ROWS, {})
    assert table(tmp_path / "results.db") == undisturbed


def busy_worker() -> int:
    """A process of ours that Ray runs a group in."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = (folder / "cmdline").read_bytes().startswith(b"ray::_measure")
            ours = f"{os.environ['PYTEST_CURRENT_TEST']}".encode() in (folder / "environ").read_bytes()
        except OSError:
            continue
        if named and ours:
            return int(folder.name)
    raise AssertionError("no worker is at work")
