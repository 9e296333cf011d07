"""The engine for several processes and machines: groups of configurations as tasks on Ray.

The driver deals out groups and writes all rows; a worker loads the model once, and sends back every result as it is
made. A group whose worker was lost is begun again behind what it had sent. Workers need the package, the model and the
data under the same paths.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmq_kernels.sweep.grid import Setting
from mmq_kernels.sweep.run import Pending
from mmq_kernels.sweep.workbench import Machine, Measured, Work, Workbench

OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray that is started here: what travels is small."""


class WorkersLost(RuntimeError):
    """A group whose worker was lost again and again."""


@dataclass(frozen=True)
class OnRay:
    """Measures in tasks on Ray.

    Attributes:
        address: of a cluster; None starts Ray on this machine.
        workers_asked: groups at a time; None: as many as the CPUs and GPUs allow.
        cpus, gpus: that a task is given.
        retries: how often a group is begun again whose worker was lost.
    """

    address: str | None = None
    workers_asked: int | None = None
    cpus: float = 1
    gpus: float = 0
    retries: int = 3

    def __post_init__(self) -> None:
        for name, least in (("cpus", 0), ("gpus", 0), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.workers_asked is not None and self.workers_asked < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers_asked}")
        if not self.cpus and not self.gpus:
            raise ValueError("a task must be given CPUs or GPUs, got none of both")
        _ray()

    @property
    def workers(self) -> int:
        """How many groups are measured at a time; connects to Ray.

        Raises:
            RuntimeError: where no task fits.
        """
        ray = _ray()
        self._connect()
        there = ray.cluster_resources()
        wanted = {name: each for name, each in (("CPU", self.cpus), ("GPU", self.gpus)) if each}
        fit = min(int(there.get(name, 0) / each + 1e-9) for name, each in wanted.items())
        if fit < 1:
            has = ", ".join(f"{there.get(name, 0):g} {name}" for name in wanted)
            needs = ", ".join(f"{each:g} {name}" for name, each in wanted.items())
            raise RuntimeError(f"no task fits: one needs {needs}, Ray has {has}")
        return fit if self.workers_asked is None else min(fit, self.workers_asked)

    def run(self, setting: Setting, pending: Pending, machine: Machine) -> None:
        """See `Engine`.

        Raises:
            WorkersLost: for a group whose workers were lost more than `retries` times.
        """
        ray, workers = _ray(), self.workers
        # Results depend on the number of threads: workers have as many as this process would.
        machine = replace(machine, threads=machine.threads or torch.get_num_threads())
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_measure)
        remote = task.options(num_returns="streaming").remote
        common = ray.put((setting, machine, pending.recipes))
        running: dict[Any, _Group] = {}
        try:
            while True:
                while len(running) < workers and (works := pending.take()):
                    pending.begun(works[0])
                    running[remote(common, works)] = _Group(tuple(work.recipe for work in works))
                if not running:
                    return
                for stream in ray.wait(list(running), num_returns=1)[0]:
                    group = running.pop(stream)
                    try:
                        said = ray.get(next(stream))
                    except StopIteration:
                        continue
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause from None
                    except ray.exceptions.RayError as error:
                        if works := self._left(pending, group, error):
                            running[remote(common, works)] = replace(group, lost=group.lost + 1)
                        continue
                    running[stream] = group
                    if isinstance(said, Work):
                        pending.begun(said)
                    else:
                        pending.done(said)
        finally:
            for stream in running:
                ray.cancel(stream, force=True)
            ray.shutdown()

    def _left(self, pending: Pending, group: _Group, error: Exception) -> list[Work]:
        """What a lost worker leaves to be done, if it is to be begun again."""
        works = pending.left(group.recipes)
        if works and group.lost >= self.retries:
            what = works[0].recipe or "the model as it is"
            raise WorkersLost(f"the worker of {what} was lost {group.lost + 1} times: {_first_line(error)}") from None
        return works

    def _connect(self) -> None:
        ray = _ray()
        if ray.is_initialized():
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address is not None:
            ray.init(address=self.address, **quiet)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # the latency of models is measured
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        count = None if self.workers_asked is None else max(1, int(self.workers_asked * self.cpus + 0.999))
        ray.init(
            address="local",
            num_cpus=count,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ImportError("engine ray needs Ray: pip install 'mmq_kernels[ray]'") from None
    return ray


@dataclass(frozen=True)
class _Group:
    """What a task does, and how often its worker was lost."""

    recipes: tuple[str, ...]
    lost: int = 0


_benches: dict[str, Workbench] = {}
"""Of this worker process: the one it used last."""


def _measure(common: tuple[Setting, Machine, Sequence[str]], works: Sequence[Work]) -> Iterator[Work | Measured]:
    """In a worker: each work as it begins, and each result."""
    setting, machine, recipes = common
    key = f"{setting.model_dump_json()} {machine} {hash(tuple(recipes))}"
    if key not in _benches:
        while _benches:
            _benches.popitem()[1].close()
        _benches[key] = Workbench(setting, machine)
        _benches[key].expect(recipes)
    begun: list[Work] = []
    for _, measured in _benches[key].measure(works, begun.append):
        while begun:  # not `yield from`: Ray sends into what it runs
            yield begun.pop(0)
        yield measured


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
