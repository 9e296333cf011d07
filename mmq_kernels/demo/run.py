"""`run_demo`: quantize the shipped miniatures in many ways, score each, and say what it cost."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from mmq_kernels.eval.calibration import CalibrationData, CalibrationSource
from mmq_kernels.models import component_prefixes, quantize_model

CALIBRATION_SAMPLES = 128
OPTIONS = evaluation.EvalOptions(batch_size=100, meteor=False, top_k=4)
"""The study's protocol, but for METEOR (a Java process a row) and for 4 candidates re-ranked instead of 128."""

CAPTIONS_PER_IMAGE = 1
"""Of the gallery's five: a search space of 500 x 500, whose re-ranking takes seconds a row."""

EXAMPLES = 8
"""Images shown on the HTML page."""

Progress = Callable[[int, int, str], None]


@dataclass
class Subject:
    """One of the miniatures: the model as trained, what it is calibrated on and what it is scored on."""

    model: nn.Module
    processor: Any
    calibration: CalibrationSource
    prepared: dict[str, evaluation.Prepared]

    def __post_init__(self) -> None:
        self.components = tuple(component_prefixes(self.model))
        self._batches: list[dict[str, Any]] = []
        self._outcomes: dict[str, Outcome] = {}

    def outcome(self, variant: Variant) -> Outcome:
        """Scores of a variant; what does not touch this model is measured once."""
        recipe = variant.recipe(self.components)
        if recipe not in self._outcomes:
            self._outcomes[recipe] = self._measure(recipe)
        return self._outcomes[recipe]

    def _measure(self, recipe: str) -> Outcome:
        model = self.model
        started = time.perf_counter()
        layers: list[dict[str, Any]] = []
        if recipe:
            model = copy.deepcopy(model)
            layers = quantize_model(model, recipe, self._calibrated(recipe)).to_json()["layers"]
        quantized = time.perf_counter()
        results = {
            task: evaluation.evaluate_prepared(model, data, options=OPTIONS) for task, data in self.prepared.items()
        }
        size = evaluation.model_size(model, component_prefixes(model))
        return Outcome(results, size, layers, quantized - started, time.perf_counter() - quantized)

    def _calibrated(self, recipe: str) -> list[dict[str, Any]]:
        if "gptq" not in recipe:
            return []
        if not self._batches:
            self._batches = self.calibration.batches(self.model, self.processor)
        return self._batches


@dataclass(frozen=True)
class Outcome:
    """What one model under one recipe scored and weighed; times in seconds."""

    results: dict[str, evaluation.EvalResult]
    size: evaluation.ModelSize
    layers: list[dict[str, Any]]
    quantize_seconds: float
    evaluate_seconds: float


def run_demo(
    out: str | Path,
    variants: Sequence[Variant],
    *,
    size: WorldSize = WorldSize(),  # noqa: B008 (frozen)
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every variant on captioning, question answering and retrieval.

    Args:
        out: folder for the world, ``results.json`` and ``index.html``.
        variants: the first is the one that the others are compared with.
        size, seed: of the world.
        progress: told (variants done, in all, name).

    Returns:
        What ``results.json`` holds: one object a variant under "rows".
    """
    started = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    world = write_world(out / "world", seed=seed, size=size)
    writer, matcher = _subjects(world, seed)
    rows: list[dict[str, Any]] = []
    base: dict[str, evaluation.EvalResult] = {}
    for i, variant in enumerate(variants):
        if progress:
            progress(i, len(variants), variant.name)
        told, matched = writer.outcome(variant), matcher.outcome(variant)
        results = {**told.results, **matched.results}
        base = base or results
        rows.append(_row(variant, told, matched, results, base, world))
    if progress:
        progress(len(variants), len(variants), "done")
    report = {
        "rows": rows,
        "samples": {task: result.samples for task, result in base.items()},
        "seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "versions": base["caption"].versions,
        "settings": {task: result.settings for task, result in base.items()},
    }
    beside = out / ".results.json.tmp"
    beside.write_text(json.dumps(report, indent=1))
    os.replace(beside, out / "results.json")
    write_report(report, out / "index.html")
    return report


def _subjects(world: Path, seed: int) -> tuple[Subject, Subject]:
    """The captioning and answering model, and the retrieving one."""
    halves = CALIBRATION_SAMPLES // 2
    told = (
        CalibrationData("caption", world / "coco", halves, seed),
        CalibrationData("vqa", world / "vqav2", CALIBRATION_SAMPLES - halves, seed),
    )
    matched = (CalibrationData("retrieval", world / "flickr30k", CALIBRATION_SAMPLES, seed),)
    writer = _subject("blip2", told, {"caption": world / "coco", "vqa": world / "vqav2"})
    return writer, _subject("blip2-itm", matched, {"retrieval": world / "flickr30k"})


def _subject(name: str, calibration: tuple[CalibrationData, ...], tasks: dict[str, Path]) -> Subject:
    folder = weights_folder(name)
    processor = checkpoint.load_processor(folder)
    prepared = {
        task: evaluation.prepare(
            task, data, processor, captions_per_image=CAPTIONS_PER_IMAGE if task == "retrieval" else None
        )
        for task, data in tasks.items()
    }
    model = checkpoint.load(folder, dtype=torch.float32)
    return Subject(model, processor, CalibrationSource(calibration), prepared)


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
