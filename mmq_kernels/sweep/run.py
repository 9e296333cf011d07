"""`Sweep`: configurations of one setting, checked wholly, then measured by an engine into a database.

    grid = Grid.read("grid.yaml")
    with Store("results.db") as store:
        Sweep(grid, grid.configurations()).run(store)

A row is a configuration's on a task. A row that is there is not made again; one that is not is, whatever became of the
sweep before.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmq_kernels import checkpoint
from mmq_kernels.checkpoint.folder import read_config
from mmq_kernels.checkpoint.format import KEY
from mmq_kernels.checkpoint.loading import fetched
from mmq_kernels.checkpoint.skeleton import build_skeleton
from mmq_kernels.eval.identity import images_of, samples_digest
from mmq_kernels.eval.images import open_image
from mmq_kernels.eval.matching import MatchingModel
from mmq_kernels.eval.prompted import PromptedModel
from mmq_kernels.eval.protocol import protocol_for
from mmq_kernels.eval.result import write_predictions
from mmq_kernels.models.plan import Planner
from mmq_kernels.quantize import Recipe
from mmq_kernels.sweep.grid import Configuration, Setting
from mmq_kernels.sweep.identity import code_version, model_digest
from mmq_kernels.sweep.store import Result, Store, fingerprint
from mmq_kernels.sweep.tree import SharedWork, Step, depth_first, legs, shared_work, steps_of, subtrees
from mmq_kernels.sweep.workbench import Machine, Measured, Work, plan_of, prepare_tasks

LEAST_GROUPS = 4
"""Groups of configurations for each worker: enough that none waits long for the last."""

Progress = Callable[[int, int, str], None]


class Engine(Protocol):
    """Where configurations are measured."""

    @property
    def workers(self) -> int:
        """How many are measured at a time."""

    def run(self, setting: Setting, pending: Pending, machine: Machine) -> None:
        """Take work from `pending` until there is none, and hand in what came of it."""


@dataclass(frozen=True)
class Summary:
    """How a sweep went.

    Attributes:
        made, there: rows made, and rows that were there before.
        failed: what could not be measured, and why.
        seconds: of all.
    """

    made: int
    there: int
    failed: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Row:
    """One row to be: a configuration on a task."""

    configuration: Configuration
    task: str
    fingerprint: str


class Sweep:
    """Configurations of one setting, checked.

    Args:
        setting: model, tasks, calibration and options.
        configurations: of any number of methods.

    Attributes:
        rows: all that will be, in depth-first order.
        shared: how much of the work is shared.

    Raises:
        ValueError, DataError, ModelMismatch, CheckpointError: for what could not be run, before anything is.
    """

    def __init__(self, setting: Setting, configurations: Sequence[Configuration]) -> None:
        if not configurations:
            raise ValueError("a sweep must have configurations, got none")
        self.setting = setting
        folder = fetched(setting.model)
        if KEY in read_config(folder):
            raise ValueError(f"{folder} is quantized already; give the unquantized model")
        self._processor = checkpoint.load_processor(folder)
        model = build_skeleton(folder)
        paths = _paths(model, configurations, setting)
        self._prepared = prepare_tasks(setting, self._processor)
        for task in setting.tasks:
            _check_task(model, self._processor, task)
        source = setting.source()
        if source is not None:
            source.check(model)
        self._calibration = source.fingerprint() if source is not None else ""
        self._calibration_images = source.images() if source is not None else []
        self.shared: SharedWork = shared_work(
            [paths[recipe] for recipe in dict.fromkeys(c.recipe for c in configurations)]
        )
        self._legs = {recipe: legs(steps) for recipe, steps in paths.items()}
        ordered = depth_first(configurations, [self._legs[c.recipe] for c in configurations])
        facts = self._facts(model_digest(folder))
        self.rows = [Row(each, task, fingerprint(**facts(each, task))) for each in ordered for task in setting.tasks]

    def check_images(self, progress: Progress | None = None) -> None:
        """Open every image: a damaged one is named now, rather than hours later.

        Raises:
            DataError: naming it.
        """
        images = [image for data in self._prepared.values() for image in images_of(data)]
        images = list(dict.fromkeys([*self._calibration_images, *images]))
        for number, image in enumerate(images, 1):
            open_image(image)
            if progress and (number % 50 == 0 or number == len(images)):
                progress(number, len(images), "opening images")

    def missing(self, store: Store) -> list[Row]:
        """Rows that the database lacks."""
        lacking = store.missing(row.fingerprint for row in self.rows)
        return [row for row in self.rows if row.fingerprint in lacking]

    def run(
        self,
        store: Store,
        engine: Engine | None = None,
        machine: Machine = Machine(),  # noqa: B008 (frozen)
        progress: Progress | None = None,
    ) -> Summary:
        """Make the rows that are missing.

        Args:
            engine: default: in this process.
            progress: told (rows there, rows in all, configuration begun last).

        Raises:
            DataError: for data that cannot be read; what was done is kept.
        """
        from mmq_kernels.sweep.engines import Local

        started = time.perf_counter()
        rows = self.missing(store)
        engine = engine or Local()
        pending = Pending(self, store, rows, LEAST_GROUPS * engine.workers, progress)
        try:
            if rows:
                engine.run(self.setting, pending, machine)
        finally:
            store.release(pending.owner)
        return Summary(pending.made, len(self.rows) - len(rows), pending.failed, time.perf_counter() - started)

    def path(self, recipe: str) -> Sequence[tuple[str, str]]:
        """Keys of a recipe's components."""
        return self._legs[recipe]

    def result(self, row: Row, measured: Measured) -> Result:
        """What stands in the database."""
        return Result(
            fingerprint=row.fingerprint,
            model=self.setting.model,
            task=row.task,
            method=row.configuration.method,
            factors=row.configuration.factors,
            metrics=measured.metrics,
            intervals=measured.intervals,
            samples=measured.samples,
            data=str(self.setting.tasks[row.task].data),
            recipe=row.configuration.recipe,
            bpw=measured.bpw,
            bytes=measured.bytes,
            latency=measured.latency,
            seconds=measured.seconds,
            seed=self.setting.seed,
            versions=measured.versions,
            settings=_settings(self.setting, row.task),
        )

    def _facts(self, model: str) -> Callable[[Configuration, str], dict[str, Any]]:
        digests = {task: samples_digest(data) for task, data in self._prepared.items()}
        options = self.setting.evaluation.model_dump()
        gptq = self.setting.gptq.model_dump()
        tokenizer = {task: self._prepared[task].tokenizer for task in self._prepared}

        def facts(configuration: Configuration, task: str) -> dict[str, Any]:
            recipe = Recipe.parse(configuration.recipe) if configuration.recipe else None
            calibrated = recipe is not None and recipe.calibrated
            return {
                "code": code_version(),
                "model": model,
                "recipe": configuration.recipe,
                "method": configuration.method,
                "factors": dict(configuration.factors),
                "gptq": gptq if recipe is not None and {"gptq", "gptq+"} & recipe.methods else None,
                "calibration": self._calibration if calibrated else None,
                "task": task,
                "data": digests[task],
                "evaluation": options | {"tokenizer": tokenizer[task]},
                "seed": self.setting.seed,
            }

        return facts


@dataclass
class Pending:
    """Rows that are to be made, dealt out in groups that share most, and taken in as they come.

    Attributes:
        owner: of the claims.
        made: rows made so far.
        failed: what could not be measured, and why.
    """

    sweep: Sweep
    store: Store
    rows: Sequence[Row]
    least_groups: int
    progress: Progress | None = None
    owner: str = field(default_factory=lambda: f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex[:8]}")
    made: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            self._rows.setdefault((row.configuration.recipe, row.task), []).append(row)
        recipes = list(dict.fromkeys(row.configuration.recipe for row in self.rows))
        self._groups = subtrees(recipes, [self.sweep.path(recipe) for recipe in recipes], self.least_groups)
        self._told = ""
        self._done = len(self.sweep.rows) - len(self.rows)

    @property
    def recipes(self) -> list[str]:
        """Of all that is to be made."""
        return list(dict.fromkeys(recipe for recipe, _ in self._rows))

    def take(self) -> list[Work]:
        """A group that nobody else works on, or if there is none, one that somebody does, from its other end.

        Empty when there is nothing left.
        """
        while self._groups:
            place = next((i for i, group in enumerate(self._groups) if self._claimed(group)), None)
            group = self._groups.pop(0 if place is None else place)
            works = self.left(group if place is not None else group[::-1])
            if works:
                return works
        return []

    def works(self) -> Iterator[Work]:
        """All groups, one work after the other, for an engine that takes them one by one."""
        while group := self.take():
            for work in group:
                yield from self.left([work.recipe])

    def left(self, recipes: Sequence[str]) -> list[Work]:
        """What still has to be done of some recipes: another sweep may have brought rows meanwhile."""
        found = []
        for recipe in recipes:
            tasks = []
            for task in self.sweep.setting.tasks:
                rows = self._rows.get((recipe, task), [])
                if rows and self.store.missing(row.fingerprint for row in rows):
                    tasks.append(task)
                elif rows:
                    self._count(recipe, task)
            if tasks:
                found.append(Work(recipe, tuple(tasks)))
        return found

    def begun(self, work: Work) -> None:
        """Somebody has begun with it."""
        self._told = work.recipe or "as it is"
        self._tell()

    def done(self, measured: Measured) -> None:
        """Keep what came of it: predictions first, then the rows."""
        rows = self._rows.get((measured.recipe, measured.task), [])
        if measured.error:
            self.failed[f"{measured.recipe or 'as it is'} on {measured.task}"] = measured.error
        else:
            for row in rows:
                path = self.store.predictions(row.fingerprint)
                path.parent.mkdir(exist_ok=True)
                write_predictions(measured.records, path)
            self.made += self.store.add(self.sweep.result(row, measured) for row in rows)
        self.store.renew(self.owner)
        self._count(measured.recipe, measured.task)

    def _count(self, recipe: str, task: str) -> None:
        self._done += len(self._rows.pop((recipe, task), ()))
        self._tell()

    def _claimed(self, group: Sequence[str]) -> bool:
        rows = [
            row for recipe in group for task in self.sweep.setting.tasks for row in self._rows.get((recipe, task), ())
        ]
        return not rows or self.store.claim([row.fingerprint for row in rows], self.owner)

    def _tell(self) -> None:
        if self.progress:
            self.progress(self._done, len(self.sweep.rows), self._told)


def _paths(model: Any, configurations: Sequence[Configuration], setting: Setting) -> dict[str, list[Step]]:
    """The path of each recipe.

    Raises:
        ValueError: naming the configuration that does not fit the model, or lacks calibration.
    """
    found: dict[str, list[Step]] = {}
    planner = Planner(model)
    for each in configurations:
        if each.recipe in found:
            continue
        try:
            plan = plan_of(planner, each.recipe)
        except ValueError as error:
            raise ValueError(f"{error}, in configuration {each}") from None
        if any(stage.needs_data for stage in plan.stages) and setting.source() is None:
            raise ValueError(f"{each.method} needs calibration data, the grid has none, in configuration {each}")
        found[each.recipe] = steps_of(plan)
    return found


def _check_task(model: Any, processor: Any, task: str) -> None:
    """Raises ModelMismatch for a task that the model cannot do."""
    if task == "retrieval":
        MatchingModel(model, processor)
    else:
        protocol_for(model, task)
        PromptedModel(model, processor)


def _settings(setting: Setting, task: str) -> dict[str, Any]:
    """What all configurations have in common on a task, for the record."""
    found = setting.model_dump(mode="json", include={"calibration", "gptq", "evaluation"})
    return found | setting.tasks[task].model_dump(mode="json", exclude={"data"})
