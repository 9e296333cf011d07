"""How bad a model is at a task: how far single units move its outputs, the loss of the shortlist, the task's metrics.

Samples come from the training split, from images that calibration does not show. Where `mmq_kernels.eval` has one for
model and task, the loss is the teacher-forced NLL of the references,

    loss = sum_i w_i nll_i / sum_i w_i tokens_i,   w_i = exp(-nll_i of the float model / tokens_i):

a sample counts by how likely the float model finds its reference. On those that it gets wrong, quantization changes
the NLL by much and in either direction: a handful of them would decide. Elsewhere (retrieval, models that evaluation
does not know) the loss is how far the outputs have moved from the float model's (`divergence`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmq_kernels.eval import (
    CaptionSample,
    DataError,
    EvalOptions,
    EvalResult,
    ModelMismatch,
    RetrievalGallery,
    evaluate_prepared,
    prepare,
)
from mmq_kernels.eval.calibration import CalibrationData, CalibrationSource
from mmq_kernels.eval.datasets import evaluated_images, image_key, read_split
from mmq_kernels.eval.images import require_images
from mmq_kernels.eval.prepared import Prepared

METRICS = {
    "caption": ("cider",),
    "vqa": ("accuracy",),
    "gqa": ("accuracy",),
    "retrieval": ("text_r1", "image_r1"),
}
"""By task the metrics that decide; more is better."""

SPLIT = "train"
TOP_K = 4
"""Candidates of retrieval that are re-ranked."""

LEAST_KNOWN = 1e-6
"""Weight of a sample at least."""

LIKELIEST = 8
"""Tokens at each position whose logits count in a deviation."""

MOST = 1024
"""Samples that the shortlist is scored on where nobody says how many."""


@dataclass(frozen=True)
class _Chosen(CalibrationData):
    """Samples that are drawn already."""

    chosen: tuple[Any, ...] = ()

    def drawn(self) -> list[Any]:
        return list(self.chosen)


@dataclass(frozen=True)
class TaskData:
    """Samples of a task that a model is scored on. Made by `task_data`.

    Attributes:
        base: the split that they are of.
        samples: in a random order; those of retrieval are images with their captions.
    """

    base: Prepared
    samples: tuple[Any, ...]

    @property
    def task(self) -> str:
        return self.base.task

    def first(self, count: int) -> TaskData:
        """The first `count` samples."""
        return replace(self, samples=self.samples[:count])

    def prepared(self) -> Prepared:
        """As `evaluate_prepared` takes them; of retrieval one caption an image."""
        chosen: Any = list(self.samples)
        one = None
        if self.task == "retrieval":
            chosen, one = RetrievalGallery.from_samples(chosen, 1), 1
        return replace(self.base, samples=chosen, limit=len(self.samples), captions_per_image=one, _scorers=[])

    def batches(self, model: Any) -> list[dict[str, Any]]:
        """As calls of a model take them; references and all."""
        source = _Chosen(self.task, self.base.folder, len(self.samples), self.base.seed, self.samples)
        return CalibrationSource((source,)).batches(model, self.base.processor)

    def names(self) -> list[str]:
        """What tells the samples apart."""
        return [str(s.image_id if isinstance(s, CaptionSample) else s.question_id) for s in self.samples]


def task_data(
    task: str,
    folder: str | Path,
    processor: Any,
    *,
    calibration: CalibrationSource | None,
    count: int | None = None,
    seed: int = 0,
) -> TaskData:
    """A draw from the training split that shares no image with the calibration samples.

    Args:
        count: of samples; None takes what is left, at most `MOST`.

    Raises:
        DataError: where so many are not left, or the data are not what the task needs.
    """
    if count is not None and count < 1:
        raise ValueError(f"selection must be at least 1, got {count}")
    base = prepare(task, folder, processor, split=SPLIT, limit=1, seed=seed)
    everything = read_split(task, folder, SPLIT)
    evaluated = evaluated_images(task, Path(folder))
    shown = {image.resolve() for image in calibration.images()} if calibration else set()
    left = [
        sample
        for sample in everything
        if image_key(task, sample) not in evaluated and sample.image.resolve() not in shown
    ]
    if len(left) < (count or 1):
        raise DataError(
            f"selection needs {count or 1} samples of the {SPLIT} split on images that neither calibration nor "
            f"evaluation shows, {folder} has {len(left)} of {len(everything)}; take fewer of these, or of calibration"
        )
    random.Random(f"selection {seed}").shuffle(left)
    chosen = left[: count or MOST]
    require_images(chosen)
    return TaskData(base, tuple(chosen))


class Scorer:
    """Loss and metrics of models on samples.

    Args:
        model: the float model.
        data: what models are scored on.
        batch_size: samples a forward pass.

    Attributes:
        loss_name: "nll" (nats a reference token, weighted), or "divergence" where evaluation has no such thing.
        float_loss: of the float model.
        why_not: why `mmq_kernels.eval` cannot do the task with this model; "" where it can.

    Raises:
        ModelMismatch: for a task that neither evaluation nor calibration can do with this model.
    """

    def __init__(self, model: Any, data: TaskData, batch_size: int = 64) -> None:
        self.data, self.batch_size = data, batch_size
        self._prepared = data.prepared()
        self.why_not = ""
        try:
            first = evaluate_prepared(model, data.first(2).prepared(), options=self._options(generate=True))
            nll = first.metrics.get("nll") is not None
        except ModelMismatch as error:
            nll, self.why_not = False, str(error)
        self.loss_name = "nll" if nll else "divergence"
        self._known: dict[Any, float] = {}
        if nll:
            known = {row["id"]: math.exp(-row["nll"] / row["nll_tokens"]) for row in self._records(model)}
            self._known = {key: max(value, LEAST_KNOWN) for key, value in known.items()}
            self.float_loss = self.loss(model)
        else:
            model.eval()
            self.float_loss = 0.0
            self._batches = data.batches(model)
            self._expected = [output_of(model, batch).cpu() for batch in self._batches]

    def _options(self, *, generate: bool) -> EvalOptions:
        return EvalOptions(batch_size=self.batch_size, generate=generate, meteor=False, top_k=TOP_K)

    def loss(self, model: Any) -> float:
        """Of a model, quantized or not; less is better."""
        if self.loss_name == "nll":
            rows = [(self._known[row["id"]], row["nll"], row["nll_tokens"]) for row in self._records(model)]
            return sum(known * nll for known, nll, _ in rows) / sum(known * tokens for known, _, tokens in rows)
        model.eval()
        lost = weight = 0.0
        for batch, expected in zip(self._batches, self._expected, strict=True):
            own = divergence(output_of(model, batch), expected, batch)
            lost, weight = lost + own[0], weight + own[1]
        return lost / weight

    def _records(self, model: Any) -> list[dict[str, Any]]:
        return evaluate_prepared(model, self._prepared, options=self._options(generate=False)).records

    def evaluate(self, model: Any) -> EvalResult:
        """The task's metrics, where evaluation can do it."""
        return evaluate_prepared(model, self._prepared, options=self._options(generate=True))


class Probe:
    """How far a model's outputs are from the float model's, on samples: what single units are measured by.

    Of logits over tokens, those of the `LIKELIEST` tokens of the float model count, their mean taken off, at every
    position by the float model's probability of the token that follows; of anything else all values:

        deviation = sum ||ours - float||^2 / sum ||float||^2.

    Deviations of units add up as far as their errors are independent, also where losses do not: a loss is what is
    left of them by saturation, and on few samples it is mostly that of the hardest.

    Args:
        model: the float model.
        data: samples of the task.

    Raises:
        ModelMismatch: see `output_of`.
    """

    def __init__(self, model: Any, data: TaskData) -> None:
        self.data = data
        model.eval()
        self._batches = data.batches(model)
        self._expected: list[tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]] = []
        for batch in self._batches:
            output = output_of(model, batch)
            known = _known(output, batch)
            if known is None:
                self._expected.append((None, None, (output - output.mean()).cpu(), output.mean().cpu()))
            else:
                values, tokens = output[:, :-1].topk(min(LIKELIEST, output.shape[-1]))
                self._expected.append((known.cpu(), tokens.cpu(), _centred(values).cpu(), None))

    def deviation(self, model: Any) -> float:
        """Of a model, quantized or not; 0 for the float model."""
        model.eval()
        lost = whole = 0.0
        for batch, (known, tokens, expected, mean) in zip(self._batches, self._expected, strict=True):
            output = output_of(model, batch)
            expected = expected.to(output.device)
            if known is None or tokens is None:
                assert mean is not None
                ours, weight = output - mean.to(output.device), torch.ones((), device=output.device)
            else:
                ours = _centred(output[:, :-1].gather(-1, tokens.to(output.device)))
                weight = known.to(output.device).unsqueeze(-1)
            lost += float((weight * (ours - expected).square()).sum(dtype=torch.float64))
            whole += float((weight * expected.square()).sum(dtype=torch.float64))
        return lost / whole if whole > 0 else 0.0


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def _known(logits: Tensor, batch: dict[str, Any]) -> Tensor | None:
    """Probability ``[batch, tokens - 1]`` of the token that follows, 0 on padding; None for what is no logits."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or logits.dim() != 3 or ids.shape != logits.shape[:2]:
        return None
    following = ids[:, 1:, None].to(logits.device)
    known = logits[:, :-1].log_softmax(-1).gather(-1, following).squeeze(-1).exp()
    return known * (mask[:, 1:] * mask[:, :-1]).to(known) if isinstance(mask, Tensor) else known


@torch.inference_mode()
def output_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """What a model makes of a batch: its logits, its scores of images against texts, or its last hidden states.

    Raises:
        ModelMismatch: for a model that puts out nothing of the kind.
    """
    device = next(model.parameters()).device
    found = model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if isinstance(found.get(name), Tensor):
            return found[name].float()
    raise ModelMismatch(f"{type(model).__name__} puts out {', '.join(found)}: nothing that a loss is known for")


def divergence(ours: Tensor, theirs: Tensor, batch: dict[str, Any]) -> tuple[float, float]:
    """How far an output is from the float model's: a sum, and the weight to divide it by.

    Of logits over tokens ``sum_t w_t KL(theirs_t || ours_t)`` in nats, where ``w_t`` is the float model's probability
    of the token that follows: what cannot be known from what stands before it says nothing. Of anything else the
    squared distance as a share of the variance.

    Args:
        ours, theirs: ``[batch, tokens, vocabulary]``, or of any other shape.
        batch: with ``input_ids`` and perhaps ``attention_mask`` ``[batch, tokens]``.
    """
    theirs = theirs.to(ours.device)
    known = _known(theirs, batch)
    if known is None:
        variance = float((theirs - theirs.mean()).square().sum(dtype=torch.float64))
        return float((ours - theirs).square().sum(dtype=torch.float64)) / (variance or 1.0), 1.0
    ours, theirs = ours[:, :-1].log_softmax(-1), theirs[:, :-1].log_softmax(-1)
    apart = (theirs.exp() * (theirs - ours)).sum(-1)
    return float((known * apart).sum(dtype=torch.float64)), float(known.sum(dtype=torch.float64))


def main_metric(task: str, metrics: dict[str, float | None]) -> float | None:
    """The mean of the metrics that decide."""
    values: Sequence[float | None] = [metrics.get(name) for name in METRICS[task]]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
