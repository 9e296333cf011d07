"""Loaders for the publishers' own layouts of COCO captions, VQAv2 and Flickr30k.

==========  =======================  ======================================================================
task        data                     files under the dataset's folder
==========  =======================  ======================================================================
caption     COCO captions (2017)     annotations/captions_{val2017,train2017}.json, {val2017,train2017}/*.jpg
vqa         VQAv2                    questions/v2_OpenEnded_mscoco_{val,train}2014_questions.json,
                                     annotations/v2_mscoco_{val,train}2014_annotations.json,
                                     {val,train}2014/COCO_{val,train}2014_%012d.jpg
retrieval   Flickr30k                annotations/flickr30k_{test,val,train}.json ([{image, caption}]), or
                                     Karpathy's dataset_flickr30k.json; images beside or in flickr30k-images/
==========  =======================  ======================================================================

Evaluation reads `val` or `test`; calibration reads `train` and nothing else. Every draw is seeded.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.json_files import entries, field, read_json, unique

TASKS = ("caption", "vqa", "retrieval")
SPLITS = {"caption": ("val", "train"), "vqa": ("val", "train"), "retrieval": ("test", "val", "train")}
"""Splits of each task; the first is the one evaluated by default."""

CALIBRATION_SPLIT = "train"
VQA_ANSWERS = 10
"""Human answers a VQAv2 question carries."""

_FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
_T = TypeVar("_T")


@dataclass(frozen=True)
class CaptionSample:
    """An image and its reference captions."""

    image_id: int | str
    image: Path
    references: tuple[str, ...]


@dataclass(frozen=True)
class VqaSample:
    """A question about an image and its ten human answers."""

    question_id: int
    image: Path
    question: str
    answers: tuple[str, ...]
    answer_type: str
    question_type: str

    @property
    def common_answer(self) -> str:
        """The answer most people gave; of equally common ones, the first."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True)
class RetrievalGallery:
    """Images and captions to be found by each other.

    Attributes:
        image_ids: one id an image.
        images: one path an image.
        captions: all captions, image by image.
        image_of: for each caption the index of its image.
    """

    image_ids: tuple[int | str, ...]
    images: tuple[Path, ...]
    captions: tuple[str, ...]
    image_of: tuple[int, ...]

    @classmethod
    def from_samples(cls, samples: Sequence[CaptionSample], captions_per_image: int | None = None) -> RetrievalGallery:
        """The gallery of `samples`, with the first `captions_per_image` of each image, or all."""
        pairs = [(i, text) for i, sample in enumerate(samples) for text in sample.references[:captions_per_image]]
        return cls(
            tuple(sample.image_id for sample in samples),
            tuple(sample.image for sample in samples),
            tuple(text for _, text in pairs),
            tuple(i for i, _ in pairs),
        )


Samples = list[CaptionSample] | list[VqaSample] | RetrievalGallery


def load(
    task: str,
    folder: str | Path,
    split: str | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    captions_per_image: int | None = None,
) -> Samples:
    """Samples of `task` under `folder`, in the order of the file.

    Args:
        task: `caption`, `vqa` or `retrieval`.
        folder: the dataset's root, laid out as in this module's table.
        split: one of `SPLITS[task]`; None is the evaluation split.
        limit: at most so many samples (images, for retrieval), drawn without replacement with `seed`.
        captions_per_image: of a retrieval gallery, the first so many of each image; None takes all.

    Raises:
        DataError: a file or image is missing, of another layout, or holds an id twice.
        ValueError: unknown task or split, or a limit below 1.
    """
    if captions_per_image is not None and (captions_per_image < 1 or task != "retrieval"):
        raise ValueError(
            f"captions_per_image must be at least 1 and belongs to task retrieval, got {captions_per_image} "
            f"for task {task}"
        )
    samples = _subset(_load_all(task, Path(folder), split), limit, seed)
    _require_images(sample.image for sample in samples)
    return RetrievalGallery.from_samples(samples, captions_per_image) if task == "retrieval" else samples


def calibration_samples(
    task: str, folder: str | Path, count: int, seed: int = 0
) -> list[CaptionSample] | list[VqaSample]:
    """Exactly `count` samples of the train split, drawn with `seed`: never from the split that is evaluated.

    Raises:
        DataError: the train split is missing, or has fewer samples.
    """
    folder = Path(folder)
    try:
        samples = _load_all(task, folder, CALIBRATION_SPLIT)
    except DataError as error:
        raise DataError(f"{error} (calibration draws from the train split only)") from None
    if len(samples) < count:
        raise DataError(f"calibration needs {count} samples, {folder} has {len(samples)} in its train split")
    chosen = _subset(samples, count, seed)
    _require_images(sample.image for sample in chosen)
    return chosen


def _load_all(task: str, folder: Path, split: str | None) -> list[Any]:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    split = SPLITS[task][0] if split is None else split
    if split not in SPLITS[task]:
        raise ValueError(f"split of task {task} must be one of {', '.join(SPLITS[task])}, got {split!r}")
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}")
    samples = _READERS[task](folder, split)
    if not samples:
        raise DataError(f"the {split} split of {folder} has no samples for task {task}")
    return samples


def _subset(samples: list[_T], limit: int | None, seed: int) -> list[_T]:
    if limit is None:
        return samples
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if limit >= len(samples):
        return samples
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), limit))]


def _require_images(images: Iterable[Path]) -> None:
    for image in images:
        if not image.is_file():
            raise DataError(f"no image {image}")


def _coco_captions(folder: Path, split: str) -> list[CaptionSample]:
    year = f"{split}2017"
    path = folder / "annotations" / f"captions_{year}.json"
    content = read_json(path)
    names = {
        field(entry, "id", (int, str), path): field(entry, "file_name", str, path)
        for entry in unique(entries(content, "images", path), "id", path)
    }
    references: dict[int | str, list[str]] = {image_id: [] for image_id in names}
    for annotation in unique(entries(content, "annotations", path), "id", path):
        image_id = field(annotation, "image_id", (int, str), path)
        if image_id not in references:
            raise DataError(f"{path}: a caption belongs to image {image_id}, which the file does not list")
        references[image_id].append(field(annotation, "caption", str, path))
    return [
        CaptionSample(image_id, folder / year / names[image_id], tuple(texts))
        for image_id, texts in references.items()
        if texts
    ]


def _vqav2(folder: Path, split: str) -> list[VqaSample]:
    year = f"{split}2014"
    question_path = folder / "questions" / f"v2_OpenEnded_mscoco_{year}_questions.json"
    answer_path = folder / "annotations" / f"v2_mscoco_{year}_annotations.json"
    questions = unique(entries(read_json(question_path), "questions", question_path), "question_id", question_path)
    annotations = {
        field(entry, "question_id", int, answer_path): entry
        for entry in unique(entries(read_json(answer_path), "annotations", answer_path), "question_id", answer_path)
    }
    samples = []
    for question in questions:
        question_id = field(question, "question_id", int, question_path)
        if question_id not in annotations:
            raise DataError(f"{answer_path}: no answers for question {question_id} of {question_path}")
        annotation = annotations[question_id]
        answers = tuple(field(a, "answer", str, answer_path) for a in entries(annotation, "answers", answer_path))
        if len(answers) != VQA_ANSWERS:
            raise DataError(f"{answer_path}: question {question_id} needs {VQA_ANSWERS} answers, has {len(answers)}")
        image_id = field(question, "image_id", int, question_path)
        samples.append(
            VqaSample(
                question_id,
                folder / year / f"COCO_{year}_{image_id:012d}.jpg",
                field(question, "question", str, question_path),
                answers,
                str(annotation.get("answer_type", "")),
                str(annotation.get("question_type", "")),
            )
        )
    return samples


def _flickr30k(folder: Path, split: str) -> list[CaptionSample]:
    path = folder / "annotations" / f"flickr30k_{split}.json"
    if path.is_file():
        return _flickr30k_list(folder, path)
    for karpathy in (folder / "dataset_flickr30k.json", folder / "annotations" / "dataset_flickr30k.json"):
        if karpathy.is_file():
            return _flickr30k_karpathy(folder, karpathy, split)
    raise DataError(f"missing {path} (or Karpathy's {folder / 'dataset_flickr30k.json'})")


def _flickr30k_list(folder: Path, path: Path) -> list[CaptionSample]:
    """`[{image, caption}]`: a list of captions an image, or (train) one caption an entry, image by image."""
    content = read_json(path)
    captions: dict[str, list[str]] = {}
    for entry in entries(content, None, path):
        name, caption = field(entry, "image", str, path), field(entry, "caption", (str, list), path)
        if isinstance(caption, str):
            captions.setdefault(name, []).append(caption)
        elif name in captions:
            raise DataError(f"{path}: image {name} is listed twice")
        elif not caption or not all(isinstance(text, str) for text in caption):
            raise DataError(f"{path}: caption of image {name} must be a list of strings")
        else:
            captions[name] = list(caption)
    locate = _flickr_locator(folder, captions)
    return [CaptionSample(name, locate / name, tuple(texts)) for name, texts in captions.items()]


def _flickr30k_karpathy(folder: Path, path: Path, split: str) -> list[CaptionSample]:
    images = [
        entry
        for entry in unique(entries(read_json(path), "images", path), "filename", path)
        if field(entry, "split", str, path) == split
    ]
    names = [field(entry, "filename", str, path) for entry in images]
    locate = _flickr_locator(folder, names)
    return [
        CaptionSample(
            name,
            locate / name,
            tuple(field(sentence, "raw", str, path) for sentence in entries(entry, "sentences", path)),
        )
        for name, entry in zip(names, images, strict=True)
    ]


def _flickr_locator(folder: Path, names: Iterable[str]) -> Path:
    """The folder that image names are relative to: the root, or one of the usual image folders."""
    first = next(iter(names), None)
    places = [folder, *(folder / name for name in _FLICKR_FOLDERS)]
    return next((place for place in places if first is not None and (place / first).is_file()), folder)


_READERS: dict[str, Callable[[Path, str], list[Any]]] = {
    "caption": _coco_captions,
    "vqa": _vqav2,
    "retrieval": _flickr30k,
}
