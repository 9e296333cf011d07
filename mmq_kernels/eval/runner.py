"""`evaluate`: a model, a task and a data folder go in; metrics, intervals and every prediction come out.

    data = prepare("vqa", "data/vqav2", processor, limit=2000)
    before = evaluate_prepared(model, data)
    after = evaluate_prepared(quantized, data)
    compare(after, before)["accuracy"]

A quantized model is a model like any other. What does not depend on the model (annotations, pixel values,
tokenized references) is made once by `prepare` and shared by every model evaluated on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from mmq_kernels.eval.datasets import RetrievalGallery
from mmq_kernels.eval.generative import run_queries
from mmq_kernels.eval.identity import run_facts
from mmq_kernels.eval.matching import retrieval_model
from mmq_kernels.eval.predictions import Entry, Log, PredictionLog, Record, Run, finite
from mmq_kernels.eval.prepared import Prepared, prepare
from mmq_kernels.eval.processed import ProcessedModel, run_processed
from mmq_kernels.eval.prompted import PromptedModel
from mmq_kernels.eval.protocol import Protocol, protocol_for
from mmq_kernels.eval.records import entries_of, gallery_records, queries_of, records_of
from mmq_kernels.eval.result import EvalResult, intervals, versions
from mmq_kernels.eval.retrieval import TOP_K, score_gallery
from mmq_kernels.eval.scoring import score_records
from mmq_kernels.eval.team import ALONE, Progress, Team
from mmq_kernels.eval.work import Effort, Reply, Sharing, same_bits


@dataclass(frozen=True)
class EvalOptions:
    """How a task is run; the defaults are the study's.

    Attributes:
        batch_size: images, prompts or texts a forward pass.
        num_beams, max_new_tokens: instead of the protocol's; None keeps them.
        generate: whether answers are generated (else the NLL only).
        nll: whether the references' likelihood is measured.
        nll_references: of a caption's references, the `first` or `all`.
        meteor: whether METEOR is computed where Java is (it costs seconds).
        top_k: candidates re-ranked by the matching head a direction; 0 for none.
    """

    batch_size: int = 64
    num_beams: int | None = None
    max_new_tokens: int | None = None
    generate: bool = True
    nll: bool = True
    nll_references: str = "first"
    meteor: bool = True
    top_k: int = TOP_K

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_beams", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if self.nll_references not in ("first", "all"):
            raise ValueError(f"nll_references must be first or all, got {self.nll_references!r}")
        if not (self.generate or self.nll):
            raise ValueError("generate or nll must be on, got neither")


def evaluate(
    model: Any,
    processor: Any,
    task: str,
    folder: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    tokenizer: str = "auto",
    options: EvalOptions = EvalOptions(),
    predictions: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> EvalResult:
    """`prepare` and `evaluate_prepared` in one; see there."""
    data = prepare(task, folder, processor, split=split, limit=limit, seed=seed, tokenizer=tokenizer)
    return evaluate_prepared(model, data, options=options, predictions=predictions, resume=resume, progress=progress)


def evaluate_prepared(
    model: Any,
    data: Prepared,
    *,
    options: EvalOptions = EvalOptions(),
    predictions: str | Path | None = None,
    resume: bool = False,
    model_name: str | None = None,
    team: Team = ALONE,
    progress: Progress | None = None,
) -> EvalResult:
    """Evaluates `model` on `data`; every rank of `team` calls it alike and gets the same result.

    Args:
        model: a transformers model, put into `eval()` mode.
        predictions: a file for the records, one JSON object a line, and ``.run.json`` beside it. What is done is kept
            in the folder ``predictions.partial`` until all is; ranks on several machines need it in common.
        resume: go on behind what an earlier run left there, or complete a file that was cut off. The file, and the
            numbers, are those of an undisturbed run.
        model_name: tells the model from others in `predictions`; None makes a digest of its weights.
        team: the ranks that share the work, from `mmq_kernels.eval.team.launched`; this process alone by default.
        progress: called with (done, in all), of all ranks, on rank 0.

    Raises:
        ModelMismatch: the model cannot do the task.
        PredictionsError: an unfinished run is there without `resume`, or one of something else, or a damaged line.
        DataError: an image cannot be read, a reference is empty.
    """
    model.eval()
    start = time.perf_counter()
    run = _Retrieval(model, data, options) if data.task == "retrieval" else _Questions(model, data, options)
    with closing(_log(run, predictions, resume, model_name, team)) as log:
        if log.finished is None:
            with same_bits(model.device):
                records, effort = run.records(Sharing(team, log, progress))
        else:
            records, effort = log.finished, Effort()

        def conclude() -> EvalResult:
            result = _result(run, records, effort, log, start)
            if log.finished is None:
                log.finish(result.records, {"settings": result.settings, "versions": result.versions})
            return result

        return team.lead(conclude)


def _log(
    run: _Questions | _Retrieval, path: str | Path | None, resume: bool, model_name: str | None, team: Team
) -> Log:
    """Where predictions are kept; rank 0 looks what is there, for all.

    Raises:
        PredictionsError: see `PredictionLog.begin`; or ranks do not do the same.
    """
    if path is None:
        if resume:
            raise ValueError("resume needs predictions: the file to go on with")
        return Log()
    data = run.data
    scoring = {"task": data.task, "seed": data.seed, "tokenizer": data.tokenizer, "meteor": run.options.meteor}
    mine = Run(run_facts(run.model, data, run.asked(), model_name), scoring)
    for rank, other in enumerate(team.gather(mine.facts)):
        mine.require_same(other, f"rank {rank}")
    log = PredictionLog(path, mine, team.rank)

    def begin() -> tuple[Sequence[Entry], list[Record] | None, Mapping[str, Any]]:
        log.begin(resume, lambda records: entries_of(data, records))
        return log.kept, log.finished, log.about

    log.kept, log.finished, log.about = team.lead(begin)
    return log


def _result(run: _Questions | _Retrieval, records: list[Record], effort: Effort, log: Log, start: float) -> EvalResult:
    """Scores `records`; speeds are of what was computed now."""
    data, told = run.data, log.about.get("settings", {}) if log.finished is not None else run.settings()
    with effort.stage("scoring"):
        scored = score_records(data.task, finite(records), data.caption_scorer, meteor=run.options.meteor)
    settings = {"model": type(run.model).__name__, **data.settings(), **told}
    model_seconds = _model_seconds(effort)
    return EvalResult(
        task=data.task,
        metrics=scored.metrics,
        intervals=intervals(scored.records, data.seed),
        breakdown=scored.breakdown,
        samples=scored.samples,
        seconds={**effort.seconds, "total": time.perf_counter() - start},
        samples_per_second=effort.samples / max(model_seconds, 1e-9) if effort.samples else math.nan,
        tokens_per_second=_tokens_per_second(effort),
        settings={**settings, **scored.settings},
        versions=versions(),
        records=scored.records,
    )


def _model_seconds(effort: Effort) -> float:
    """Time of the answers (or rankings); of the likelihoods only where nothing was generated."""
    work = "generate" if effort.tokens else "nll"
    return sum(effort.seconds.get(stage, 0.0) for stage in ("features", "prompt", work, "retrieval"))


def _tokens_per_second(effort: Effort) -> float | None:
    if not effort.tokens:
        return None
    return effort.tokens / max(effort.seconds["prompt"] + effort.seconds["generate"], 1e-9)


@dataclass(frozen=True)
class _Questions:
    """Captions and answers: a query a sample."""

    model: Any
    data: Prepared
    options: EvalOptions

    def protocol(self) -> Protocol:
        protocol = protocol_for(self.model, self.data.task)
        asked = {"num_beams": self.options.num_beams, "max_new_tokens": self.options.max_new_tokens}
        changes = {name: value for name, value in asked.items() if value is not None}
        return replace(protocol, decoding=replace(protocol.decoding, **changes))

    def settings(self) -> dict[str, Any]:
        """What a result says about how it was asked."""
        likelihood = self.options.nll_references if self.options.nll else None
        return {**self.protocol().settings(), "batch_size": self.options.batch_size, "nll_references": likelihood}

    def asked(self) -> dict[str, Any]:
        """What replies depend on beside model and data."""
        return {**self.settings(), "generate": self.options.generate}

    def records(self, sharing: Sharing) -> tuple[list[Record], Effort]:
        protocol = self.protocol()
        queries = queries_of(self.data, protocol, self.options.nll_references if self.options.nll else None)
        decoding = protocol.decoding if self.options.generate else None
        batch_size = self.options.batch_size
        replies: list[Reply]
        if self.model.config.model_type == "blip-2":
            opened = PromptedModel(self.model, self.data.processor)
            replies, effort = run_queries(
                opened,
                queries,
                self.data.pixels,
                decoding=decoding,
                batch_size=batch_size,
                kept=self.data.features,
                sharing=sharing,
            )
        else:
            whole = ProcessedModel(self.model, self.data.processor, protocol)
            replies, effort = run_processed(whole, queries, decoding=decoding, batch_size=batch_size, sharing=sharing)
        return records_of(self.data, replies), effort


@dataclass
class _Retrieval:
    """Ranks in a gallery."""

    model: Any
    data: Prepared
    options: EvalOptions
    matched: tuple[int, int] = (0, 0)

    def settings(self) -> dict[str, Any]:
        """What a result says about how it was ranked."""
        top_k, pairs = self.matched
        return {"batch_size": self.options.batch_size, "top_k": top_k, "matched_pairs": pairs}

    def asked(self) -> dict[str, Any]:
        """What scores depend on beside model and data."""
        return {"batch_size": self.options.batch_size, "top_k": self.options.top_k}

    def records(self, sharing: Sharing) -> tuple[list[Record], Effort]:
        effort = Effort()
        scores = score_gallery(
            retrieval_model(self.model, self.data.processor),
            cast(RetrievalGallery, self.data.samples),
            self.data.pixels,
            top_k=self.options.top_k,
            batch_size=self.options.batch_size,
            sharing=sharing,
            effort=effort,
        )
        self.matched = scores.top_k, scores.pairs
        return gallery_records(self.data, scores), effort
