"""Metrics from records of predictions: those just made, or those of a file, which give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmq_kernels.eval.answers import answer_accuracy, exact_accuracy
from mmq_kernels.eval.captions import CaptionScorer
from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.predictions import Record, read_predictions
from mmq_kernels.eval.result import EvalResult, intervals, versions
from mmq_kernels.eval.retrieval import Ranking

Metrics = dict[str, float | None]
ACCURACIES = {"vqa": answer_accuracy, "gqa": exact_accuracy}
KINDS = {"vqa": ("answer_type", "question_type"), "gqa": ("answer_type", "structural_type", "semantic_type")}
"""By what accuracy is broken down."""

_JAVA_S = ("meteor_counts", "spice")
"""What a record may hold from a run that had Java, and this one has not."""


@dataclass(frozen=True)
class Scored:
    """Records with their scores, and what all of them come to."""

    records: list[Record]
    metrics: Metrics
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Images of a gallery, or records."""
        galleries = [record for record in self.records if record.get("kind") == "image"]
        return len(galleries or self.records)


def score_records(
    task: str, records: Sequence[Record], scorer: Callable[[], CaptionScorer] | None = None, *, meteor: bool = True
) -> Scored:
    """Scores `records` of `task`.

    Args:
        scorer: of captions; None makes one from the references in the records.
        meteor: whether captions get METEOR where Java is.
    """
    if task == "retrieval":
        return Scored(list(records), _recalls(records))
    if task == "caption":
        return _captions(records, scorer, meteor)
    return _questions(task, records)


def score_predictions(
    path: str | Path,
    *,
    task: str | None = None,
    seed: int | None = None,
    tokenizer: str | None = None,
    meteor: bool | None = None,
) -> EvalResult:
    """The result of a file of predictions, without model or data; what is None is as it was in its run.

    Args:
        task: that the records have to be of.
        seed: of the intervals.
        tokenizer: of captions before scoring: `ptb`, `plain` or `auto`.
        meteor: whether captions get METEOR where Java is.

    Raises:
        PredictionsError: the file is missing, damaged (the line is named), or not whole.
        DataError: its records are of no task, or not of the one that was given.
    """
    found = read_predictions(path)
    if not found.records:
        raise DataError(f"{path} holds no predictions")
    known = {"task": None, "seed": 0, "tokenizer": "auto", "meteor": True, **found.about.get("scoring", {})}
    given = {"task": task, "seed": seed, "tokenizer": tokenizer, "meteor": meteor}
    chosen: dict[str, Any] = {**known, **{name: value for name, value in given.items() if value is not None}}
    told = _task_of(found.records)
    chosen["task"] = chosen["task"] or told
    if chosen["task"] != told:
        raise DataError(f"{path} holds records of task {told}, not of {chosen['task']}")

    def scorer() -> CaptionScorer:
        references = {record["id"]: record["references"] for record in found.records}
        return CaptionScorer(references, tokenizer=chosen["tokenizer"])

    try:
        scored = score_records(chosen["task"], found.records, scorer, meteor=chosen["meteor"])
        around = intervals(scored.records, chosen["seed"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no records of task {chosen['task']}: {error} is missing or of another kind"
        ) from None
    settings = {**found.about.get("settings", {}), "seed": chosen["seed"]}
    return EvalResult(
        task=chosen["task"],
        metrics=scored.metrics,
        intervals=around,
        breakdown=scored.breakdown,
        samples=scored.samples,
        seconds={},
        samples_per_second=math.nan,
        tokens_per_second=None,
        settings={**settings, **scored.settings},
        versions=found.about.get("versions", versions()),
        records=scored.records,
    )


def _task_of(records: Sequence[Record]) -> str:
    first = records[0]
    if "kind" in first:
        return "retrieval"
    if "references" in first:
        return "caption"
    if "answers" in first:
        return "gqa" if "structural_type" in first else "vqa"
    raise DataError(f"a record with {', '.join(first)} is of no task that is known")


def _captions(records: Sequence[Record], scorer: Callable[[], CaptionScorer] | None, meteor: bool) -> Scored:
    if "caption" not in records[0]:
        return Scored(list(records), _nll(records))
    used = CaptionScorer({record["id"]: record["references"] for record in records}) if scorer is None else scorer()
    scores = used.score({record["id"]: record["caption"] for record in records}, meteor=meteor)
    own = [
        {**{key: value for key, value in record.items() if key not in _JAVA_S}, **image}
        for record, image in zip(records, scores.per_image, strict=True)
    ]
    settings = {"tokenizer": scores.tokenizer, "not_computed": scores.not_computed}
    return Scored(own, scores.metrics | _nll(records), settings=settings)


def _questions(task: str, records: Sequence[Record]) -> Scored:
    if "prediction" not in records[0]:
        return Scored(list(records), _nll(records))
    accuracy = ACCURACIES[task]
    own = [{**record, "accuracy": accuracy(record["prediction"], record["answers"])} for record in records]
    metrics: Metrics = {"accuracy": float(np.mean([record["accuracy"] for record in own]))}
    return Scored(own, metrics | _nll(records), {kind: _mean_by(own, kind) for kind in KINDS[task]})


def _recalls(records: Sequence[Record]) -> Metrics:
    def recalls(after: str) -> dict[str, float]:
        text, image = (
            np.array([record[f"{other}_rank{after}"] for record in records if record["kind"] == kind])
            for kind, other in (("image", "text"), ("caption", "image"))
        )
        return Ranking(text, image).recalls()

    contrastive = {f"{name}_contrastive": value for name, value in recalls("_contrastive").items()}
    return {**recalls(""), **contrastive}


def _nll(records: Sequence[Record]) -> Metrics:
    """Nats a token; no number where one of the likelihoods is none."""
    scored = [record for record in records if record.get("nll_tokens")]
    tokens = sum(record["nll_tokens"] for record in scored)
    nats = [math.nan if record["nll"] is None else record["nll"] for record in scored]
    return {"nll": sum(nats) / tokens} if tokens else {}


def _mean_by(records: Sequence[Record], kind: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for record in records:
        values.setdefault(record[kind], []).append(record["accuracy"])
    return {name: float(np.mean(values[name])) for name in sorted(values)}
