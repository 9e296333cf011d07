"""The outcome of an evaluation: metrics with intervals, every sample's prediction, and how it was all
made."""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from mmq_kernels.eval.bootstrap import CorpusSamples, Interval, MetricSamples, Samples, interval, paired_interval
from mmq_kernels.eval.corpus import bleu, meteor
from mmq_kernels.eval.predictions import Record, finite, record_line

RECALL_METRICS = {
    f"{direction}_r{k}{after}": (kind, f"{direction}_rank{after}", k)
    for after in ("", "_contrastive")
    for direction, kind in (("text", "image"), ("image", "caption"))
    for k in (1, 5, 10)
}
"""Recalls: the kind of record, the rank in it, and what it has to be below."""

CORPUS_METRICS: dict[str, tuple[str, Callable[..., Any]]] = {
    **{f"bleu_{n}": ("bleu_counts", partial(bleu, order=n)) for n in range(1, 5)},
    "meteor": ("meteor_counts", meteor),
}
"""Metrics that are functions of summed counts: the counts in a record, and the function."""


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found.

    Attributes:
        task: `caption`, `vqa`, `gqa` or `retrieval`.
        metrics: fractions (CIDEr on its own scale, NLL in nats per token); None where one could not be
        computed.
        intervals: 95% bootstrap intervals of all that were computed.
        breakdown: accuracy by answer type and question type (vqa), or structural and semantic type (gqa).
        samples: questions, captioned images, or images of the gallery.
        seconds: the model's time by stage, and `total` with reading and scoring.
        samples_per_second: of what was computed in this run over the model's time; no number where nothing was.
        tokens_per_second: generated tokens over the time of reading prompts and generating; None without.
        settings: data, prompt, decoding, batch size, tokenization, candidates.
        versions: of the software.
        records: one a sample (retrieval: one an image and one a caption).
    """

    task: str
    metrics: dict[str, float | None]
    intervals: dict[str, Interval]
    breakdown: dict[str, dict[str, float]]
    samples: int
    seconds: dict[str, float]
    samples_per_second: float
    tokens_per_second: float | None
    settings: dict[str, Any]
    versions: dict[str, str]
    records: list[Record]

    def to_json(self, *, records: bool = True) -> dict[str, Any]:
        """Plain values that `json` can write; what is no finite number becomes None."""
        plain = asdict(self)
        if not records:
            del plain["records"]
        return finite(plain)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EvalResult:
        """The result that `to_json` wrote."""
        intervals = {name: Interval(**values) for name, values in content["intervals"].items()}
        return cls(**{"records": [], **content, "intervals": intervals})


def metric_samples(records: Iterable[Record]) -> dict[str, Samples]:
    """Every metric sample by sample, from the records of any task.

    Samples about one image form a cluster.
    """
    records = list(records)
    series: dict[str, Samples] = {}
    for name in ("cider", "rouge_l", "spice", "accuracy"):
        chosen = [record for record in records if record.get(name) is not None]
        if chosen:
            series[name] = _samples(chosen, [record[name] for record in chosen], [1.0] * len(chosen))
    for name, (counts, metric) in CORPUS_METRICS.items():
        chosen = [record for record in records if record.get(counts) is not None]
        if chosen:
            rows = tuple(tuple(float(count) for count in record[counts]) for record in chosen)
            keys, images = (tuple(record[key] for record in chosen) for key in ("id", "image"))
            series[name] = CorpusSamples(keys, rows, metric, images)
    scored = [record for record in records if record.get("nll_tokens")]
    if scored:
        series["nll"] = _samples(
            scored,
            [math.nan if record["nll"] is None else record["nll"] for record in scored],
            [float(record["nll_tokens"]) for record in scored],
        )
    for name, (kind, rank, below) in RECALL_METRICS.items():
        chosen = [record for record in records if record.get("kind") == kind and record.get(rank) is not None]
        if chosen:
            series[name] = _samples(chosen, [float(record[rank] < below) for record in chosen], [1.0] * len(chosen))
    return series


def intervals(records: Iterable[Record], seed: int = 0) -> dict[str, Interval]:
    """95% bootstrap intervals of every metric that `metric_samples` finds."""
    return {name: interval(samples, seed=seed) for name, samples in metric_samples(records).items()}


def compare(result: EvalResult, baseline: EvalResult, seed: int = 0) -> dict[str, Interval]:
    """``result - baseline`` with paired 95% intervals, for every metric that both have sample by sample.

    Raises:
        ValueError: the two were not measured on the same samples.
    """
    ours, theirs = metric_samples(result.records), metric_samples(baseline.records)
    return {name: paired_interval(ours[name], theirs[name], seed=seed) for name in ours if name in theirs}


def write_predictions(records: Iterable[Record], path: str | Path) -> None:
    """Writes one JSON object a line, beside `path` first and then in its place: whole or not at all.

    Raises:
        OSError: the folder is missing, not writable or full.
    """
    path = Path(path)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for record in records:
                file.write(record_line(record) + b"\n")
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    names = ("mmq_kernels", "torch", "transformers", "pycocoevalcap")
    found = {name: _version(name) for name in names}
    return {**found, "python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _samples(records: list[Record], numerator: list[float], denominator: list[float]) -> MetricSamples:
    return MetricSamples(
        tuple(record["id"] for record in records),
        tuple(numerator),
        tuple(denominator),
        tuple(record["image"] for record in records),
    )
