"""`run_demo`: quantize the shipped miniatures in many ways, score each, and say what it cost."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmq_kernels import checkpoint
from mmq_kernels import eval as evaluation
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.report import COLUMNS, write_report
from mmq_kernels.demo.variants import Variant
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.models import component_prefixes, quantize_model

OPTIONS = evaluation.EvalOptions(batch_size=100, meteor=False, top_k=4)
"""The study's protocol, but for METEOR (a Java process a row) and for 4 candidates re-ranked instead of 128."""

CAPTIONS_PER_IMAGE = 1
"""Of the gallery's five: a search space of 500 x 500, whose re-ranking takes seconds a row."""

EXAMPLES = 8
"""Images shown on the HTML page."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Outcome:
    """What one model under one recipe scored and weighed; times in seconds."""

    results: dict[str, evaluation.EvalResult]
    size: evaluation.ModelSize
    layers: list[dict[str, Any]]
    quantize_seconds: float
    evaluate_seconds: float


@dataclass(frozen=True)
class Subject:
    """One of the miniatures, and what it is calibrated and scored on: pairs of a task and its folder in the world."""

    name: str
    tasks: tuple[tuple[str, str], ...]


WRITER = Subject("blip2", (("caption", "coco"), ("vqa", "vqav2")))
MATCHER = Subject("blip2-itm", (("retrieval", "flickr30k"),))


def run_demo(
    out: str | Path,
    variants: Sequence[Variant],
    *,
    size: WorldSize = WorldSize(),  # noqa: B008 (frozen)
    seed: int = 0,
    calibration_samples: int = 128,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every variant on captioning, question answering and retrieval, the two models side by side.

    Args:
        out: folder for the world, ``results.json`` and ``index.html``.
        variants: the first is the one that the others are compared with.
        size, seed: of the world.
        calibration_samples: of GPTQ, for each model.
        progress: told (measurements done, in all, what).

    Returns:
        What ``results.json`` holds: one object a variant under "rows".
    """
    started = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    world = write_world(out / "world", seed=seed, size=size)
    settings = _Settings(world, seed, calibration_samples, threads=_threads())
    outcomes = _measure_all(variants, settings, progress)
    rows: list[dict[str, Any]] = []
    base: dict[str, evaluation.EvalResult] = {}
    for variant in variants:
        told, matched = (outcomes[subject, _recipe(variant, subject)] for subject in (WRITER, MATCHER))
        results = {**told.results, **matched.results}
        base = base or results
        rows.append(_row(variant, told, matched, results, base, world))
    report = {
        "rows": rows,
        "samples": {task: result.samples for task, result in base.items()},
        "seconds": time.perf_counter() - started,
        "threads": settings.threads,
        "seed": seed,
        "versions": base["caption"].versions,
        "settings": {task: result.settings for task, result in base.items()},
    }
    beside = out / ".results.json.tmp"
    beside.write_text(json.dumps(report, indent=1))
    os.replace(beside, out / "results.json")
    write_report(report, out / "index.html")
    return report


# --- measuring, in a process a model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What a measurement depends on beside the model and the recipe."""

    world: Path
    seed: int
    calibration_samples: int
    threads: int


def _threads() -> int:
    """Threads a process: half the cores, since two processes share them; small matrices feed no more than four."""
    return max(1, min(4, torch.get_num_threads() // 2))


def _measure_all(
    variants: Sequence[Variant], settings: _Settings, progress: Progress | None
) -> dict[tuple[Subject, str], Outcome]:
    """The outcome of every model under every recipe; variants that leave a model alone share one."""
    asked = {(subject, _recipe(variant, subject)): variant for variant in variants for subject in (WRITER, MATCHER)}
    outcomes: dict[tuple[Subject, str], Outcome] = {}
    with ExitStack() as stack:
        workers = {
            subject: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            for subject in (WRITER, MATCHER)
        }
        futures = {workers[key[0]].submit(_measure, *key, settings): key for key in asked}
        try:
            for future in as_completed(futures):
                key = futures[future]
                outcomes[key] = future.result()
                if progress:
                    progress(len(outcomes), len(asked), f"{key[0].name}: {asked[key].name}")
        except BaseException:
            for worker in workers.values():
                worker.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def _recipe(variant: Variant, subject: Subject) -> str:
    """What a variant does to a model, which may lack some components."""
    return variant.recipe(_loaded(subject.name).components)


def _measure(subject: Subject, recipe: str, settings: _Settings) -> Outcome:
    """Quantize a copy of the model and score it."""
    torch.set_num_threads(settings.threads)
    loaded = _loaded(subject.name)
    model = loaded.model
    started = time.perf_counter()
    layers: list[dict[str, Any]] = []
    if recipe:
        model = copy.deepcopy(model)
        batches = _batches(subject, settings) if "gptq" in recipe else []
        layers = quantize_model(model, recipe, batches).to_json()["layers"]
    quantized = time.perf_counter()
    results = {
        task: evaluation.evaluate_prepared(model, data, options=OPTIONS)
        for task, data in _prepared(subject, settings).items()
    }
    size = evaluation.model_size(model, component_prefixes(model))
    return Outcome(results, size, layers, quantized - started, time.perf_counter() - quantized)


@dataclass(frozen=True)
class _Loaded:
    model: nn.Module
    processor: Any
    components: tuple[str, ...]


@cache
def _loaded(name: str) -> _Loaded:
    folder = weights_folder(name)
    model = checkpoint.load(folder, dtype=torch.float32)
    return _Loaded(model, checkpoint.load_processor(folder), tuple(component_prefixes(model)))


@cache
def _prepared(subject: Subject, settings: _Settings) -> dict[str, evaluation.Prepared]:
    return {
        task: evaluation.prepare(
            task,
            settings.world / folder,
            _loaded(subject.name).processor,
            captions_per_image=CAPTIONS_PER_IMAGE if task == "retrieval" else None,
        )
        for task, folder in subject.tasks
    }


@cache
def _batches(subject: Subject, settings: _Settings) -> list[dict[str, Any]]:
    """Calibration batches; the tasks of a model share the samples as evenly as possible."""
    entries = [f"{task}:{settings.world / folder}" for task, folder in subject.tasks]
    source = CalibrationSource.parse(entries, settings.calibration_samples, settings.seed)
    assert source is not None
    loaded = _loaded(subject.name)
    return source.batches(loaded.model, loaded.processor)


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(
    variant: Variant,
    told: Outcome,
    matched: Outcome,
    results: dict[str, evaluation.EvalResult],
    base: dict[str, evaluation.EvalResult],
    world: Path,
) -> dict[str, Any]:
    caption, vqa = results["caption"], results["vqa"]
    metrics = {key: results[column.task].metrics[column.metric] for key, column in COLUMNS.items()}
    changes: dict[str, Any] = {}
    if results is not base:
        compared = {task: evaluation.compare(results[task], base[task]) for task in results}
        changes = {key: vars(compared[column.task][column.metric]) for key, column in COLUMNS.items()}
    return {
        "name": variant.name,
        "method": variant.series,
        "recipe": variant.recipe(),
        "bits": dict(zip(("vision", "connector", "language"), variant.bits, strict=True)),
        "metrics": metrics,
        "changes": changes,
        "bpw": told.size.bpw,
        "memory_bytes": told.size.memory_bytes,
        "captions_per_second": caption.samples_per_second,
        "tasks": {
            task: {"metrics": r.metrics, "breakdown": r.breakdown, "samples_per_second": r.samples_per_second}
            for task, r in results.items()
        },
        "retrieval_model": {"bpw": matched.size.bpw, "memory_bytes": matched.size.memory_bytes},
        "components": {name: part.to_json() for name, part in told.size.components.items()},
        "layers": told.layers + matched.layers,
        "quantize_seconds": told.quantize_seconds + matched.quantize_seconds,
        "evaluate_seconds": told.evaluate_seconds + matched.evaluate_seconds,
        "examples": _examples(caption, vqa, world),
    }


def _examples(caption: evaluation.EvalResult, vqa: evaluation.EvalResult, world: Path) -> list[dict[str, Any]]:
    """What a variant said about the first images, which both tasks share."""
    asked: dict[int, dict[str, Any]] = {}
    for record in vqa.records:
        asked.setdefault(record["id"] // 1000, record)
    shown = []
    for record in caption.records[:EXAMPLES]:
        question = asked[record["id"]]
        shown.append(
            {
                "image": str(world / "coco" / record["image"]),
                "caption": record["caption"],
                "reference": record["references"][0],
                "question": question["question"],
                "answer": question["prediction"],
                "truth": question["answers"][0],
                "right": question["accuracy"] > 0,
            }
        )
    return shown
