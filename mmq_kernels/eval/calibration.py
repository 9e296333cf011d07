"""Calibration batches: seeded samples of a task's training split, as the model will see that task.

The language model reads the references too, so that it is calibrated on captions and answers and not on prompts
alone. BLIP-2 gets what its own protocol gives it; its image-text-matching model is called both ways on each batch, so
that every layer of its Q-Former sees data. Every other model gets what its processor makes of image and text, laid out
as for evaluation; a language model alone the text, a vision model alone the image.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mmq_kernels.eval.datasets import QUESTION_TASKS, TASKS, CaptionSample, QuestionSample, calibration_samples
from mmq_kernels.eval.errors import ModelMismatch
from mmq_kernels.eval.images import PixelStore, open_image
from mmq_kernels.eval.protocol import clean_caption, lay_out, protocol_for

BATCH = 8
"""Samples a calibration batch holds."""


@dataclass(frozen=True)
class CalibrationData:
    """Samples of one data set.

    Attributes:
        task: caption, vqa, gqa or retrieval.
        folder: of the data set, laid out as its publisher lays it out.
        samples: how many to draw from its training split.
        seed: of the draw.
    """

    task: str
    folder: Path
    samples: int = 128
    seed: int = 0

    def drawn(self) -> list[Any]:
        """The samples, from the training split alone."""
        return list(calibration_samples(self.task, self.folder, self.samples, self.seed))


@dataclass(frozen=True)
class CalibrationSource:
    """All that a model is calibrated on: one or more data sets."""

    data: tuple[CalibrationData, ...]

    @classmethod
    def parse(cls, entries: Sequence[str], samples: int = 128, seed: int = 0) -> CalibrationSource | None:
        """From ``TASK:DIR`` entries, which share `samples` as evenly as possible; None where there are none.

        Raises:
            ValueError: for an entry of another form, an unknown task, or fewer samples than entries.
        """
        if not entries:
            return None
        if samples < len(entries):
            raise ValueError(f"samples must be at least {len(entries)}, one a data set, got {samples}")
        base, extra = divmod(samples, len(entries))
        data = []
        for i, entry in enumerate(entries):
            task, colon, folder = entry.partition(":")
            if not colon or not folder or task not in TASKS:
                raise ValueError(f"calibrate must be TASK:DIR with TASK one of {', '.join(TASKS)}, got {entry!r}")
            data.append(CalibrationData(task, Path(folder), base + (i < extra), seed))
        return cls(tuple(data))

    def fingerprint(self) -> str:
        """Equal for two draws of the same samples: names and sizes of their images, and their texts."""
        digest = hashlib.sha256()
        for source in self.data:
            digest.update(f"{source.task} {source.samples} {source.seed}\n".encode())
            for image, text in _pairs(source, source.drawn()):
                digest.update(f"{image.relative_to(source.folder)} {image.stat().st_size} {text}\n".encode())
        return digest.hexdigest()[:16]

    def check(self, model: Any) -> None:
        """Raises ModelMismatch for a task that the model, which may be on the meta device, cannot do."""
        for source in self.data:
            _builder(model, source.task)

    def images(self) -> list[Path]:
        """Of all samples drawn."""
        return [sample.image for source in self.data for sample in source.drawn()]

    def batches(self, model: Any, processor: Any) -> list[dict[str, Any]]:
        """Keyword arguments for calls of `model` that together show it every sample.

        Raises:
            DataError: a data set is missing, damaged, or smaller than asked.
            ModelMismatch: a task that the model cannot do.
        """
        batches: list[dict[str, Any]] = []
        pixels = PixelStore(processor)
        for source in self.data:
            build = _builder(model, source.task)
            samples = source.drawn()
            for start in range(0, len(samples), BATCH):
                batches += build(model, processor, pixels, source, samples[start : start + BATCH])
        return batches


Builder = Callable[[Any, Any, PixelStore, CalibrationData, Sequence[Any]], list[dict[str, Any]]]


def _builder(model: Any, task: str) -> Builder:
    """What makes batches of a task for a model.

    Raises:
        ModelMismatch: for a task that the model cannot do.
    """
    blip2, dual = model.config.model_type == "blip-2", hasattr(model, "logit_scale")
    if hasattr(model, "itm_head") or dual:
        fits, wanted = task == "retrieval", "retrieval"
    else:
        fits, wanted = task != "retrieval", "caption, vqa or gqa"
    if not fits:
        raise ModelMismatch(f"{type(model).__name__} is calibrated on task {wanted}, got {task!r}")
    if not blip2:
        return _processed
    return _matching if task == "retrieval" else _generative


def _pairs(source: CalibrationData, samples: Sequence[Any]) -> list[tuple[Path, str]]:
    """Image and reference text of each sample."""
    if source.task in QUESTION_TASKS:
        return [(s.image, f"{s.question} {s.common_answer}") for s in cast("list[QuestionSample]", samples)]
    return [(s.image, s.references[0]) for s in cast("list[CaptionSample]", samples)]


def _texts(model: Any, source: CalibrationData, samples: Sequence[Any]) -> list[tuple[str, str]]:
    """What each sample asks, and what the reference says."""
    protocol = protocol_for(model, source.task)
    if source.task in QUESTION_TASKS:
        return [(protocol.text(s.question) or "", s.common_answer) for s in cast("list[QuestionSample]", samples)]
    return [(protocol.text() or "", clean_caption(s.references[0])) for s in cast("list[CaptionSample]", samples)]


def _generative(
    model: Any, processor: Any, pixels: PixelStore, source: CalibrationData, samples: Sequence[Any]
) -> list[dict[str, Any]]:
    tokenizer = processor.tokenizer
    texts = _texts(model, source, samples)
    encoder_decoder = model.config.text_config.is_encoder_decoder
    said = [prompt if encoder_decoder else f"{prompt} {answer}".strip() for prompt, answer in texts]
    encoded = tokenizer(said, padding=True, return_tensors="pt")
    front = torch.full((len(said), model.config.num_query_tokens), model.config.image_token_index)
    batch = {
        "pixel_values": pixels([s.image for s in samples]),
        "input_ids": torch.cat([front, encoded.input_ids], 1),
        "attention_mask": torch.cat([torch.ones_like(front), encoded.attention_mask], 1),
    }
    if encoder_decoder:
        batch["labels"] = tokenizer([answer for _, answer in texts], padding=True, return_tensors="pt").input_ids
    return [_like(batch, model)]


def _matching(
    model: Any, processor: Any, pixels: PixelStore, source: CalibrationData, samples: Sequence[Any]
) -> list[dict[str, Any]]:
    texts = [clean_caption(s.references[0]) for s in cast("list[CaptionSample]", samples)]
    encoded = processor.tokenizer(texts, padding=True, truncation=True, max_length=35, return_tensors="pt")
    ids, mask = encoded.input_ids, encoded.attention_mask
    if model.config.image_token_index is not None:
        front = torch.full((len(texts), model.config.num_query_tokens), model.config.image_token_index)
        ids, mask = torch.cat([front, ids], 1), torch.cat([torch.ones_like(front), mask], 1)
    batch = _like({"pixel_values": pixels([s.image for s in samples]), "input_ids": ids, "attention_mask": mask}, model)
    return [{**batch, "use_image_text_matching_head": match} for match in (False, True)]


def _processed(
    model: Any, processor: Any, pixels: PixelStore, source: CalibrationData, samples: Sequence[Any]
) -> list[dict[str, Any]]:
    """What the model's own processor makes of images and texts, for whichever of both it takes."""
    images, texts = [[open_image(s.image)] for s in samples], _conversations(model, processor, source, samples)
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        how: dict[str, Any] = {"padding": True, "truncation": source.task == "retrieval"}
        if model.config.model_type.startswith("siglip"):
            how["padding"] = "max_length"  # as it was trained
        made = processor(images=images, text=texts, return_tensors="pt", **how)
    elif hasattr(processor, "image_mean") or hasattr(processor, "rescale_factor"):
        made = processor(images=[image for (image,) in images], return_tensors="pt")
    else:
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        made = processor(texts, padding=True, return_tensors="pt")
    taken = inspect.signature(model.forward).parameters
    batch = {key: value for key, value in made.items() if key in taken and isinstance(value, torch.Tensor)}
    return [{key: value.to(model.dtype) if value.is_floating_point() else value for key, value in batch.items()}]


def _conversations(model: Any, processor: Any, source: CalibrationData, samples: Sequence[Any]) -> list[str]:
    """Each sample as evaluation lays it out, the reference behind it; the reference alone for retrieval."""
    if source.task == "retrieval":
        return [sample.references[0] for sample in samples]
    protocol = protocol_for(model, source.task)
    asks = source.task in QUESTION_TASKS
    said = [(s.question, s.common_answer) if asks else (None, s.references[0]) for s in samples]
    asked = [(protocol.text(question) or "", answer) for question, answer in said]
    if not hasattr(processor, "image_processor"):
        return [f"{prompt} {answer}" if asks else answer for prompt, answer in asked]
    return [lay_out(processor, protocol, prompt, answer) for prompt, answer in asked]


def _like(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """Pixel values in the model's dtype."""
    return {**batch, "pixel_values": batch["pixel_values"].to(model.dtype)}
