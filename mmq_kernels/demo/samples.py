"""Training batches: scenes drawn, rendered and tokenized on the fly, with the labels of the auxiliary losses."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmq_kernels.demo.architecture import BOS, EOS, IMAGE_MEAN, IMAGE_STD, PATCH, PROMPT, QUERIES
from mmq_kernels.demo.scenes import (
    BACKGROUNDS,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    captions,
    make_scene,
    questions,
    render,
)

TRAIN_SEEDS = 1_000_000_000
"""Scenes trained on have seeds from here on; every data set written for evaluation stays below."""

IGNORED = -100
JPEG_QUALITY = 95

_CODES = tuple({value: i + 1 for i, value in enumerate(values)} for values in (SHAPES, COLORS, SIZES))
CLASSES = tuple(len(codes) + 1 for codes in _CODES)
"""Classes of shape, colour and size; 0 is "nothing there"."""


def as_jpeg(image: Image.Image) -> Image.Image:
    """The image after a trip through the file format in which data sets are written."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return Image.open(buffer)


def pixels(scenes: list[Scene]) -> Tensor:
    """fp32 ``[scenes, 3, SIDE, SIDE]``, as the processor makes them from the written files."""
    raw = np.stack([np.asarray(as_jpeg(render(scene))) for scene in scenes]).astype(np.float32) / 255
    raw = (raw - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return torch.from_numpy(raw.transpose(0, 3, 1, 2).copy())


def draw_scenes(step: int, count: int, stream: int) -> list[Scene]:
    """The scenes of a training step; streams do not overlap."""
    first = TRAIN_SEEDS * (1 + stream) + step * count
    return [make_scene(first + i) for i in range(count)]


def patch_labels(scenes: list[Scene]) -> Tensor:
    """int64 ``[scenes, patches, 3]``: shape, colour and size of the object that reaches furthest into each patch."""
    centres = (np.arange(SIDE // PATCH) + 0.5) * PATCH
    labels = np.zeros((len(scenes), SIDE // PATCH, SIDE // PATCH, 3), np.int64)
    for i, scene in enumerate(scenes):
        best = np.full(labels.shape[1:3], 1.0)
        for thing in scene.objects:
            reach = np.hypot(centres[None, :] - thing.x, centres[:, None] - thing.y) / (thing.radius + 2)
            inside = reach < best
            labels[i][inside] = _attributes(thing)
            best = np.where(inside, reach, best)
    return torch.from_numpy(labels.reshape(len(scenes), -1, 3))


def slot_labels(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """int64 ``[scenes, MAX_OBJECTS, 3]``, attributes of the objects from left to right; backgrounds ``[scenes]``."""
    labels = torch.zeros(len(scenes), MAX_OBJECTS, 3, dtype=torch.int64)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.objects):
            labels[i, j] = torch.tensor(_attributes(thing))
    grounds = tuple(BACKGROUNDS)
    return labels, torch.tensor([grounds.index(scene.background) for scene in scenes])


def _attributes(thing) -> tuple[int, int, int]:
    return _CODES[0][thing.shape], _CODES[1][thing.color], _CODES[2][thing.size]


@dataclass(frozen=True)
class TextBatch:
    """Texts that share their image's tokens: one row an image, its texts one after the other.

    Attributes:
        ids: int64 ``[images, length]``, the text tokens behind the `front` ones that all texts share.
        positions: int64 ``[images, front + length]``; every text counts on from the shared tokens.
        mask: bool ``[images, 1, front + length, front + length]``, True where attention may look.
        labels: int64 ``[images, length]``, the token each position has to predict, or `IGNORED`.
        is_answer: bool ``[images, length]``.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    is_answer: Tensor


def text_batch(
    scenes: list[Scene],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    *,
    asked: int,
    wordings: int,
    taught: bool = False,
) -> TextBatch:
    """A caption, one of the first `wordings`, and `asked` questions (see `questions`) an image, packed."""
    rows = []
    for scene in scenes:
        texts = [("", rng.choice(captions(scene)[:wordings]))]
        texts += [(PROMPT.format(q.text), q.answer) for q in questions(scene, asked, rng, taught=taught)]
        rows.append([_text(tokenizer, prompt, target) for prompt, target in texts])
    return packed(rows, QUERIES)


Text = tuple[list[int], list[int]]
"""Tokens, and for each the token it has to predict or `IGNORED`."""


def packed(rows: Sequence[Sequence[Text]], front: int) -> TextBatch:
    """Texts, the first of each row a caption, behind `front` tokens that those of a row share."""
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    count, total = len(rows), front + length
    ids = torch.zeros(count, length, dtype=torch.int64)
    labels = torch.full((count, length), IGNORED)
    is_answer = torch.zeros(count, length, dtype=torch.bool)
    positions = torch.zeros(count, total, dtype=torch.int64)
    positions[:, :front] = torch.arange(front)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    owner = torch.full((count, total), -1)  # -1: shared tokens
    for i, row in enumerate(rows):
        start = 0
        for number, (text, targets) in enumerate(row):
            end = start + len(text)
            ids[i, start:end] = torch.tensor(text)
            labels[i, start:end] = torch.tensor(targets)
            is_answer[i, start:end] = number > 0
            positions[i, front + start : front + end] = front + torch.arange(len(text))
            owner[i, front + start : front + end] = number
            start = end
        owner[i, front + start :] = len(row)
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -1)
    return TextBatch(ids, positions, (same & causal)[:, None], labels, is_answer)


def _text(tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> Text:
    """Tokens of a text and, for each, the token it has to predict (only those of the target and its end)."""
    asked = [BOS, *tokenizer(prompt, add_special_tokens=False).input_ids] if prompt else [BOS]
    return answered(asked, tokenizer, target)


def answered(asked: list[int], tokenizer: PreTrainedTokenizerFast, target: str) -> Text:
    """A text that begins with the tokens `asked` and has to go on with those of `target` and the end."""
    said = [*tokenizer(target, add_special_tokens=False).input_ids, EOS]
    return asked + said[:-1], [IGNORED] * (len(asked) - 1) + said


def disturbed(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one thing changed: an attribute, the background, or two objects exchanged."""
    objects = list(scene.objects)
    change = rng.choice(("shape", "color", "size", "order", "ground", "shape", "color"))
    if change == "ground":
        return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    if change == "order" and len(objects) > 1:
        i, j = rng.sample(range(len(objects)), 2)
        objects[i], objects[j] = objects[j], objects[i]
        return replace(scene, objects=tuple(objects))
    i = rng.randrange(len(objects))
    attribute = change if change in ("shape", "color", "size") else "color"
    values = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES)}[attribute]
    other = rng.choice([v for v in values if v != getattr(objects[i], attribute)])
    objects[i] = replace(objects[i], **{attribute: other})  # type: ignore[arg-type]
    return replace(scene, objects=tuple(objects))
