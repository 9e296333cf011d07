"""Measures configurations one after the other in one process, with everything that they share made once.

The model is loaded once, data are prepared once, calibration batches are made once, images go through vision and
connector once for each of their variants (`quantizing` has the rest). Captions are scored while the model answers the
next task: what costs time there is Java's.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from mmq_kernels import checkpoint
from mmq_kernels import eval as evaluation
from mmq_kernels.checkpoint.loading import fetched
from mmq_kernels.checkpoint.names import Names
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.eval.captions import CaptionScorer, CaptionScores
from mmq_kernels.eval.generative import Effort
from mmq_kernels.eval.meteor import Meteor
from mmq_kernels.eval.result import Record
from mmq_kernels.models.plan import Plan, Planner
from mmq_kernels.quantize import Recipe
from mmq_kernels.quantize.walk import Batch
from mmq_kernels.sweep.grid import Setting
from mmq_kernels.sweep.quantizing import SharedQuantizer, StoredDtype
from mmq_kernels.sweep.shelf import Shelf, default_bytes
from mmq_kernels.sweep.tree import Step, features_key, steps_of


@dataclass(frozen=True)
class Work:
    """What is to be measured of one recipe; an empty one leaves the model as it is."""

    recipe: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What one recipe scored on one task.

    Attributes:
        metrics, intervals: those that are finite.
        bpw, bytes: of the model; see `mmq_kernels.eval.model_size`.
        latency: seconds of the model's work a sample.
        seconds: wall time of the evaluation and of the recipe's quantization, shared evenly by its tasks.
        error: why there is nothing of all that.
    """

    recipe: str
    task: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    samples: int = 0
    bpw: float = 0.0
    bytes: int = 0
    latency: float = 0.0
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    records: Sequence[Record] = ()
    error: str = ""


@dataclass(frozen=True)
class Machine:
    """What a process has to work with: a device, CPU threads (None: torch's default), and bytes for what is shared."""

    device: str = "cpu"
    threads: int | None = None
    shared_bytes: int | None = None


def plan_of(planner: Planner, recipe: str) -> Plan:
    """The plan of a recipe, which may be empty."""
    return planner.plan(Recipe.parse(recipe)) if recipe else Plan({}, {})


def prepare_tasks(setting: Setting, processor: Any) -> dict[str, evaluation.Prepared]:
    """The data of every task, which share their images' pixel values.

    Raises:
        DataError: for data that are missing or damaged.
    """
    pixels = evaluation.PixelStore(processor)
    return {
        task: evaluation.prepare(
            task,
            own.data,
            processor,
            split=own.split,
            limit=own.limit,
            seed=setting.seed,
            captions_per_image=own.captions_per_image,
            tokenizer=setting.evaluation.tokenizer,
            pixels=pixels,
        )
        for task, own in setting.tasks.items()
    }


class Workbench:
    """A model and its data, ready to be measured under any number of recipes."""

    def __init__(self, setting: Setting, machine: Machine = Machine()) -> None:
        if machine.threads is not None:
            torch.set_num_threads(machine.threads)
        self._setting = setting
        self._folder = fetched(setting.model)
        self.processor = checkpoint.load_processor(self._folder)
        self.model: Any = checkpoint.load(self._folder, device=machine.device)
        self._shelf = Shelf(default_bytes() if machine.shared_bytes is None else machine.shared_bytes)
        self._meteor = Meteor()
        self._planner = Planner(self.model)
        self._paths: dict[str, tuple[Plan, Sequence[Step]]] = {}
        self._variants: Counter[str] = Counter()
        self._quantizer = SharedQuantizer(
            self.model, self._batches, setting.gptq.settings(), self._shelf, _stored_dtypes(self.model, self._folder)
        )

    def expect(self, recipes: Iterable[str]) -> None:
        """Say which recipes are to come, before the first: what several of them share is kept for them."""
        paths = [self._path(recipe) for recipe in dict.fromkeys(recipes)]
        self._quantizer.expect(paths)
        self._variants.update(features_key(steps) for _, steps in paths)

    def measure(
        self, works: Iterable[Work], begun: Callable[[Work], None] = lambda work: None
    ) -> Iterator[tuple[Work, Measured]]:
        """Results of all works, each as soon as it is there; `works` in depth-first order share most.

        Args:
            begun: told when one begins.

        Raises:
            DataError: for data that cannot be read: that holds for all that is to come, too.
        """
        waiting: deque[tuple[Work, Future[Measured]]] = deque()
        with ThreadPoolExecutor(2) as aside:  # one asks the model, the other scores what it said before
            for work in works:
                begun(work)
                try:
                    waiting += [(work, found) for found in self._one(work, aside)]
                except evaluation.DataError:
                    raise
                except (RuntimeError, ValueError) as error:
                    for task in work.tasks:
                        yield work, Measured(work.recipe, task, error=f"{type(error).__name__}: {error}")
                while waiting and waiting[0][1].done():
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that was started for METEOR."""
        self._meteor.close()

    def _path(self, recipe: str) -> tuple[Plan, Sequence[Step]]:
        if recipe not in self._paths:
            plan = plan_of(self._planner, recipe)
            self._paths[recipe] = plan, steps_of(plan)
        return self._paths[recipe]

    def _one(self, work: Work, aside: ThreadPoolExecutor) -> list[Future[Measured]]:
        started = time.perf_counter()
        plan, steps = self._path(work.recipe)
        variant = features_key(steps)
        kept = KeptFeatures(self._shelf, variant) if self._variants[variant] > 1 else None
        found = []
        with self._quantizer.quantized(plan, steps):
            size = evaluation.model_size(self.model)
            share = (time.perf_counter() - started) / len(work.tasks)
            for task in work.tasks:
                turn = threading.Event()
                found.append(aside.submit(self._tasks[task].run, work, self.model, size, share, kept, turn))
                turn.wait()
                if found[-1].done() and found[-1].exception() is not None:
                    found[-1].result()
        return found

    @cached_property
    def _tasks(self) -> dict[str, _Task]:
        options = self._setting.evaluation.options()
        prepared = prepare_tasks(self._setting, self.processor)
        return {task: _Task(data, options, self._meteor) for task, data in prepared.items()}

    def _batches(self) -> list[Batch]:
        source = self._setting.source()
        return list(source.batches(self.model, self.processor)) if source else []


class _Task:
    """One task's data, scored in a thread that gives the model back as soon as it has answered."""

    def __init__(self, data: evaluation.Prepared, options: evaluation.EvalOptions, meteor: Meteor) -> None:
        self._options = options
        self._scorer: _Scorer | None = None
        if data.task == "caption":
            references = {sample.image_id: sample.references for sample in data.caption_samples()}
            self._scorer = _Scorer(references, tokenizer=data.tokenizer, meteor=meteor.scores)
        self._data = data

    def run(
        self,
        work: Work,
        model: Any,
        size: evaluation.ModelSize,
        quantizing: float,
        kept: KeptFeatures | None,
        turn: threading.Event,
    ) -> Measured:
        """Score the model; sets `turn` when it may be changed again."""
        try:
            if self._scorer is not None:
                self._scorer.turn = turn
            result = evaluation.evaluate_prepared(model, self._data.sharing(kept, self._scorer), options=self._options)
        finally:
            turn.set()
        return Measured(
            recipe=work.recipe,
            task=self._data.task,
            metrics=_finite(result.metrics),
            intervals={
                name: (each.low, each.high)
                for name, each in result.intervals.items()
                if math.isfinite(each.low) and math.isfinite(each.high)
            },
            samples=result.samples,
            bpw=size.bpw,
            bytes=size.memory_bytes,
            latency=1 / result.samples_per_second,
            seconds=quantizing + result.seconds["total"],
            versions=result.versions | {"device": _device_name(model), "threads": str(torch.get_num_threads())},
            records=result.to_json()["records"],
        )


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def _device_name(model: Any) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device.type)


class _Scorer(CaptionScorer):
    """Says that the model is no longer needed, and scores then, one set of captions at a time."""

    turn: threading.Event | None = None
    _scoring = threading.Lock()

    def score(self, captions: Mapping[Any, str], *, meteor: bool = True) -> CaptionScores:
        if self.turn is not None:
            self.turn.set()
        with self._scoring:
            return super().score(captions, meteor=meteor)


class KeptFeatures:
    """Image features of one variant of vision and connector, on a shelf; see `mmq_kernels.eval.generative.Features`.

    Images are told by their content, so that tasks that ask about the same images share them.
    """

    def __init__(self, shelf: Shelf, variant: str) -> None:
        self._shelf, self._variant = shelf, variant

    def __call__(self, images: Sequence[Path], look: Callable[[], Tensor], effort: Effort) -> Tensor:
        key = ("features", self._variant, tuple(self._content(image) for image in images))
        found = self._shelf.get(key)
        if found is None:
            before = effort.seconds.get("features", 0.0)
            features = look()
            seconds = effort.seconds["features"] - before
            self._shelf.put(key, (features, seconds), features.numel() * features.element_size())
            return features
        features, seconds = found
        effort.seconds["features"] = effort.seconds.get("features", 0.0) + seconds
        return features

    def _content(self, image: Path) -> str:
        key = ("content", image)
        digest = self._shelf.get(key)
        if digest is None:
            digest = hashlib.sha256(image.read_bytes()).hexdigest()
            self._shelf.put(key, digest, len(digest))
        return digest


def _stored_dtypes(model: Any, folder: Path) -> StoredDtype:
    """In which dtypes the folder holds the model's tensors; those that it does not hold are of its config's."""
    stored = Folder(folder)
    Names(model).rename(stored)
    default = AutoConfig.from_pretrained(folder).dtype

    def dtype(name: str) -> torch.dtype | None:
        return stored.entries[name].dtype if name in stored.entries else default

    return dtype
