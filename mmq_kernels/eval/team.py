"""The processes that share an evaluation: one alone, or the ranks that torchrun or accelerate launched.

Work is cut into pieces that do not depend on how many share it. A piece goes whole to whichever rank is free: no rank
waits for a slower one, none is done twice, and what a piece gives is what one process alone would have got.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch

T = TypeVar("T")
Progress = Callable[[int, int], None]
Counter = Callable[[int], int]
"""Adds a number to a sum over all ranks, and gives the sum."""

_PATIENCE = timedelta(days=30)
"""How long a rank that is done waits for the others: its launcher ends it sooner where one of them fails."""

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many ranks there are; the last three are MPI's, which accelerate uses on CPUs."""

_POLL_SECONDS = 0.2
FAILED = 2
"""Exit code of a rank that ends because another one failed and says why."""


class Team:
    """One process alone, which is rank 0 of 1.

    Attributes:
        rank, size: which this is, of how many.
        local_rank: which this is on its machine.
    """

    rank = 0
    size = 1
    local_rank = 0

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints, scores and writes results."""
        return self.rank == 0

    def counter(self) -> Counter:
        """A sum over all ranks that starts at 0; every rank makes its counters in the same order."""
        total = 0

        def add(number: int) -> int:
            nonlocal total
            total += number
            return total

        return add

    def deal(self, pieces: int) -> Iterator[int]:
        """Numbers below `pieces`, each to one rank, in order: the next to whoever asks first."""
        dealt = self.counter()
        while (number := dealt(1) - 1) < pieces:
            yield number

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, on every rank, in order."""
        return [value]

    def lead(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; an error there ends all, and rank 0 says why."""
        return make()

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error of one rank inside ends all: the first rank that has one raises it."""
        yield


ALONE = Team()


class Ranks(Team):
    """The ranks of a launch, met through accelerate. Whatever device they compute on, they exchange Python objects
    over gloo.
    """

    def __init__(self) -> None:
        from accelerate import PartialState
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        _name_ranks()
        store, _, _ = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        self._state = PartialState(cpu=True, backend="gloo", store=store, timeout=_PATIENCE)
        self._store = PrefixStore("mmq", store)
        self._counters = 0
        self.rank, self.size = self._state.process_index, self._state.num_processes
        self.local_rank = self._state.local_process_index

    def counter(self) -> Counter:
        self._counters += 1
        key = f"counter {self._counters}"
        return lambda number: self._store.add(key, number)

    def gather(self, value: T) -> list[T]:
        from accelerate.utils import gather_object

        return gather_object([value])

    def lead(self, make: Callable[[], T]) -> T:
        made: list[Any] = [None]
        with self.together():
            if self.leads:
                made = [make()]
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list(made)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [rank for rank, other in enumerate(self.gather(error is not None)) if other]
        if failed:
            self._end(failed[0], error)

    def _end(self, first: int, error: Exception | None) -> NoReturn:
        self.close()
        if self.rank == first and error is not None:
            raise error
        raise SystemExit(FAILED)

    def close(self) -> None:
        """Part with the other ranks."""
        self._state.destroy_process_group()


def _name_ranks() -> None:
    """Puts what MPI says of ranks where torch looks for it."""
    from accelerate.utils import get_cpu_distributed_information

    told = get_cpu_distributed_information()
    for name in ("rank", "world_size", "local_rank", "local_world_size"):
        os.environ.setdefault(name.upper(), str(getattr(told, name)))
    if told.local_world_size == told.world_size:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


@contextmanager
def launched() -> Iterator[Team]:
    """The team that this process was launched in, by torchrun, accelerate launch or mpirun; else it alone."""
    if max(int(os.environ.get(name) or 1) for name in _SIZES) < 2:
        yield ALONE
        return
    ranks = Ranks()
    yield ranks
    ranks.close()


def rank_device(team: Team, chosen: torch.device) -> torch.device:
    """A GPU for each rank of a machine, where CUDA was `chosen` without a number.

    Raises:
        ValueError: there are fewer GPUs than ranks.
    """
    if team.size == 1 or chosen.type != "cuda" or chosen.index is not None:
        return chosen
    there = torch.cuda.device_count()
    if team.local_rank >= there:
        raise ValueError(
            f"rank {team.rank} is number {team.local_rank} on its machine, which has {there} CUDA devices; "
            f"launch no more ranks than devices, or name one with --device"
        )
    return torch.device("cuda", team.local_rank)


class Tally:
    """How far all ranks are together, told by rank 0.

    Args:
        total: pieces of work in all.
        progress: called with (done, total).
        done: pieces that an earlier run did.
    """

    def __init__(self, team: Team, total: int, progress: Progress | None, done: int = 0) -> None:
        self._team, self._total, self._progress, self._before = team, total, progress, done
        self._count = team.counter()
        self.add(0)

    def add(self, pieces: int) -> int:
        """Pieces that this rank did since; gives how many are done."""
        done = self._before + self._count(pieces)
        if self._team.leads and self._progress is not None and (pieces or done):
            self._progress(done, self._total)
        return done

    def wait(self) -> None:
        """On rank 0 the progress of the others, until all is done."""
        if self._team.size == 1 or not self._team.leads or self._progress is None:
            return
        done = self.add(0)
        while done < self._total:
            time.sleep(_POLL_SECONDS)
            done = self.add(0)
