"""`evaluate`: a model, a task and a data folder go in; metrics, intervals and every prediction come out.

    data = prepare("vqa", "data/vqav2", processor, limit=2000)
    before = evaluate_prepared(model, data)
    after = evaluate_prepared(quantized, data)
    compare(after, before)["accuracy"]

A quantized model is a model like any other. What does not depend on the model (annotations, pixel values,
tokenized references) is made once by `prepare` and shared by every model evaluated on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmq_kernels.eval.answers import answer_accuracy, exact_accuracy
from mmq_kernels.eval.datasets import QuestionSample, RetrievalGallery
from mmq_kernels.eval.generative import Effort, Query, Reply, run_queries
from mmq_kernels.eval.matching import retrieval_model
from mmq_kernels.eval.prepared import Prepared, prepare
from mmq_kernels.eval.processed import ProcessedModel, run_processed
from mmq_kernels.eval.prompted import PromptedModel
from mmq_kernels.eval.protocol import Protocol, clean_caption, protocol_for
from mmq_kernels.eval.result import EvalResult, Record, intervals, versions, write_predictions
from mmq_kernels.eval.retrieval import TOP_K, Ranking, score_gallery

Progress = Callable[[int, int], None]


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
    progress: Progress | None = None,
) -> EvalResult:
    """`prepare` and `evaluate_prepared` in one; see there."""
    data = prepare(task, folder, processor, split=split, limit=limit, seed=seed, tokenizer=tokenizer)
    return evaluate_prepared(model, data, options=options, predictions=predictions, progress=progress)


def evaluate_prepared(
    model: Any,
    data: Prepared,
    *,
    options: EvalOptions = EvalOptions(),
    predictions: str | Path | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Evaluates `model` on `data`.

    Args:
        model: a transformers model, put into `eval()` mode.
        predictions: a file for the records, one JSON object a line, written when all are there.
        progress: called with (done, in all).

    Raises:
        ModelMismatch: the model cannot do the task.
        DataError: an image cannot be read, a reference is empty.
    """
    model.eval()
    run = {"caption": _captions, "vqa": _questions, "gqa": _questions, "retrieval": _retrieval}[data.task]
    start = time.perf_counter()
    found = run(model, data, options, progress)
    result = EvalResult(
        task=data.task,
        metrics=found.metrics,
        intervals=intervals(found.records, data.seed),
        breakdown=found.breakdown,
        samples=found.samples,
        seconds={**found.effort.seconds, "total": time.perf_counter() - start},
        samples_per_second=found.samples / max(_model_seconds(found.effort), 1e-9),
        tokens_per_second=_tokens_per_second(found.effort),
        settings={"model": type(model).__name__, **data.settings(), **found.settings},
        versions=versions(),
        records=found.records,
    )
    if predictions is not None:
        write_predictions(result.records, predictions)
    return result


@dataclass(frozen=True)
class _Found:
    metrics: dict[str, float | None]
    records: list[Record]
    samples: int
    effort: Effort
    settings: dict[str, Any]
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)


def _model_seconds(effort: Effort) -> float:
    """Time of the answers (or rankings); of the likelihoods only where nothing was generated."""
    work = "generate" if effort.tokens else "nll"
    return sum(effort.seconds.get(stage, 0.0) for stage in ("features", "prompt", work, "retrieval"))


def _tokens_per_second(effort: Effort) -> float | None:
    if not effort.tokens:
        return None
    return effort.tokens / max(effort.seconds["prompt"] + effort.seconds["generate"], 1e-9)


def _protocol(model: Any, task: str, options: EvalOptions) -> Protocol:
    protocol = protocol_for(model, task)
    asked = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    changes = {name: value for name, value in asked.items() if value is not None}
    return replace(protocol, decoding=replace(protocol.decoding, **changes))


def _ask(
    model: Any,
    data: Prepared,
    protocol: Protocol,
    queries: list[Query],
    options: EvalOptions,
    progress: Progress | None,
) -> tuple[list[Reply], Effort]:
    decoding = protocol.decoding if options.generate else None
    if model.config.model_type == "blip-2":
        opened = PromptedModel(model, data.processor)
        return run_queries(
            opened,
            queries,
            data.pixels,
            decoding=decoding,
            batch_size=options.batch_size,
            progress=progress,
            kept=data.features,
        )
    whole = ProcessedModel(model, data.processor, protocol)
    return run_processed(whole, queries, decoding=decoding, batch_size=options.batch_size, progress=progress)


def _settings(protocol: Protocol, options: EvalOptions) -> dict[str, Any]:
    likelihood = options.nll_references if options.nll else None
    return {**protocol.settings(), "batch_size": options.batch_size, "nll_references": likelihood}


def _likelihood(reply: Reply) -> Record:
    return {} if reply.nll is None else {"nll": reply.nll, "nll_tokens": reply.nll_tokens}


def _mean_nll(replies: list[Reply]) -> dict[str, float | None]:
    tokens = sum(reply.nll_tokens for reply in replies)
    return {"nll": sum(reply.nll or 0.0 for reply in replies) / tokens} if tokens else {}


def _captions(model: Any, data: Prepared, options: EvalOptions, progress: Progress | None) -> _Found:
    samples = data.caption_samples()
    protocol = _protocol(model, data.task, options)
    wanted = None if options.nll_references == "all" else 1
    queries = [
        Query(
            sample.image,
            protocol.text(),
            tuple(clean_caption(text) for text in sample.references[:wanted]) if options.nll else (),
        )
        for sample in samples
    ]
    replies, effort = _ask(model, data, protocol, queries, options, progress)
    metrics: dict[str, float | None] = {}
    settings = _settings(protocol, options)
    per_image: list[Record] = [{} for _ in samples]
    if options.generate:
        captions = {sample.image_id: reply.text or "" for sample, reply in zip(samples, replies, strict=True)}
        with effort.stage("scoring"):
            scores = data.caption_scorer().score(captions, meteor=options.meteor)
        metrics |= scores.metrics
        settings |= {"tokenizer": scores.tokenizer, "not_computed": scores.not_computed}
        per_image = [
            {"caption": captions[sample.image_id], **own} for sample, own in zip(samples, scores.per_image, strict=True)
        ]
    records = [
        {
            "id": sample.image_id,
            "image": sample.image.relative_to(data.folder).as_posix(),
            **own,
            "references": list(sample.references),
            **_likelihood(reply),
        }
        for sample, own, reply in zip(samples, per_image, replies, strict=True)
    ]
    return _Found(metrics | _mean_nll(replies), records, len(samples), effort, settings)


def _questions(model: Any, data: Prepared, options: EvalOptions, progress: Progress | None) -> _Found:
    samples = cast("list[QuestionSample]", data.samples)
    accuracy = {"vqa": answer_accuracy, "gqa": exact_accuracy}[data.task]
    protocol = _protocol(model, data.task, options)
    queries = [
        Query(sample.image, protocol.text(sample.question), (sample.common_answer,) if options.nll else ())
        for sample in samples
    ]
    replies, effort = _ask(model, data, protocol, queries, options, progress)
    records = []
    for sample, reply in zip(samples, replies, strict=True):
        said = {} if reply.text is None else {"prediction": reply.text}
        right = {} if reply.text is None else {"accuracy": accuracy(reply.text, sample.answers)}
        records.append(
            {
                "id": sample.question_id,
                "image": sample.image.relative_to(data.folder).as_posix(),
                "question": sample.question,
                **said,
                "answers": list(sample.answers),
                **sample.kinds,
                **right,
                **_likelihood(reply),
            }
        )
    metrics: dict[str, float | None] = {}
    breakdown = {}
    if options.generate:
        metrics["accuracy"] = float(np.mean([record["accuracy"] for record in records]))
        breakdown = {kind: _mean_by(records, kind) for kind in samples[0].kinds}
    settings = _settings(protocol, options)
    return _Found(metrics | _mean_nll(replies), records, len(samples), effort, settings, breakdown)


def _mean_by(records: list[Record], kind: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for record in records:
        values.setdefault(record[kind], []).append(record["accuracy"])
    return {name: float(np.mean(values[name])) for name in sorted(values)}


def _retrieval(model: Any, data: Prepared, options: EvalOptions, progress: Progress | None) -> _Found:
    gallery = cast(RetrievalGallery, data.samples)
    effort = Effort()
    with effort.stage("retrieval"):
        scores = score_gallery(
            retrieval_model(model, data.processor),
            gallery,
            data.pixels,
            top_k=options.top_k,
            batch_size=options.batch_size,
            progress=progress,
        )
    final = scores.matched or scores.contrastive
    contrastive = {f"{name}_contrastive": value for name, value in scores.contrastive.recalls().items()}
    settings = {"batch_size": options.batch_size, "top_k": scores.top_k, "matched_pairs": scores.pairs}
    records = _gallery_records(gallery, data.folder, final, scores.contrastive)
    metrics: dict[str, float | None] = {**final.recalls(), **contrastive}
    return _Found(metrics, records, len(gallery.images), effort, settings)


def _gallery_records(gallery: RetrievalGallery, folder: Path, final: Ranking, contrastive: Ranking) -> list[Record]:
    names = [path.relative_to(folder).as_posix() for path in gallery.images]
    images = [
        {
            "kind": "image",
            "id": gallery.image_ids[i],
            "image": names[i],
            "text_rank": int(final.text[i]),
            "text_rank_contrastive": int(contrastive.text[i]),
        }
        for i in range(len(names))
    ]
    captions = [
        {
            "kind": "caption",
            "id": t,
            "image": names[gallery.image_of[t]],
            "caption": gallery.captions[t],
            "image_rank": int(final.image[t]),
            "image_rank_contrastive": int(contrastive.image[t]),
        }
        for t in range(len(gallery.captions))
    ]
    return images + captions
