"""Ranks that share an evaluation get what one process alone gets, exactly; each piece of work goes to one of them."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import evaluations, numbers

from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.team import ALONE, Tally, Team, launched, rank_device

LAUNCHED = Path(__file__).with_name("ranks.py")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = WorldSize(train=2, images=10, questions=2, gallery=8)
    return write_world(tmp_path_factory.mktemp("team") / "world", size=size)


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Files and numbers of one process, on two threads where ranks have one."""
    out, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return out, {name: numbers(result) for name, result in evaluations(world, out)}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process_exactly(
    ranks: int, world: Path, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(LAUNCHED), str(world), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["ranks"] == ranks
    assert told["found"] == json.loads(json.dumps(alone[1]))
    files = {path.name for path in alone[0].iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == files | {"found.json"}
    for name in files:
        assert (tmp_path / name).read_bytes() == (alone[0] / name).read_bytes(), name


class Threads(Team):
    """Ranks of one process, that share counters."""

    def __init__(self, rank: int, counts: dict[int, int], lock: threading.Lock) -> None:
        self.rank, self.size = rank, 4
        self._counts, self._lock, self._turn = counts, lock, 0

    def counter(self) -> Any:
        self._turn += 1
        turn = self._turn

        def add(number: int) -> int:
            with self._lock:
                self._counts[turn] = self._counts.get(turn, 0) + number
                return self._counts[turn]

        return add


@pytest.mark.parametrize("pieces", [0, 1, 3, 4, 1000])
def test_a_piece_is_dealt_once(pieces: int) -> None:
    counts, lock, dealt = {}, threading.Lock(), []  # type: ignore[var-annotated]
    ranks = [Threads(rank, counts, lock) for rank in range(4)]
    threads = [threading.Thread(target=lambda rank=rank: dealt.extend(rank.deal(pieces))) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(dealt) == list(range(pieces))


def test_rank_0_tells_the_progress_of_all() -> None:
    counts, lock, seen = {}, threading.Lock(), []  # type: ignore[var-annotated]
    told = [Tally(Threads(rank, counts, lock), 10, lambda *at: seen.append(at), done=2) for rank in range(2)]
    told[1].add(3)
    assert seen == [(2, 10)], "only rank 0 tells"
    told[0].add(1)
    threading.Timer(0.3, told[1].add, [4]).start()
    told[0].wait()
    assert seen[1] == (6, 10) and seen[-1] == (10, 10) and seen == sorted(seen)


def test_one_process_is_a_team_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched() as team:
        assert team is ALONE and team.leads and (team.rank, team.size) == (0, 1)
        assert team.gather("x") == ["x"] and team.lead(lambda: 3) == 3


def test_every_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Threads(1, {}, threading.Lock())
    team.local_rank = 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_device(team, torch.device("cuda")) == torch.device("cuda", 1)
    assert rank_device(team, torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert rank_device(team, torch.device("cpu")) == torch.device("cpu")
    assert rank_device(ALONE, torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="rank 1 is number 1 on its machine, which has 1 CUDA devices"):
        rank_device(team, torch.device("cuda"))
