"""Data sets in their publishers' own layouts.

==========  =======================  ======================================================================
task        data                     files under the dataset's folder
==========  =======================  ======================================================================
caption     COCO captions            annotations/captions_{val,train}2017.json, {val,train}2017/*.jpg; or
                                     Karpathy's dataset_coco.json (splits test, val, train with restval) with
                                     {val,train}2014/ as it says, or the 2017 folders
vqa         VQAv2                    questions/v2_OpenEnded_mscoco_{val,train}2014_questions.json,
                                     annotations/v2_mscoco_{val,train}2014_annotations.json,
                                     {val,train}2014/COCO_{val,train}2014_%012d.jpg
gqa         GQA, balanced            questions/{testdev,val,train}_balanced_questions.json, images/*.jpg
retrieval   Flickr30k                annotations/flickr30k_{test,val,train}.json ([{image, caption}]), or
                                     Karpathy's dataset_flickr30k.json; images beside or in flickr30k-images/
==========  =======================  ======================================================================

Evaluation reads the other splits; calibration reads `train` and nothing else, without the images that an
evaluated split of the same folder holds too (COCO's train2017 has most of Karpathy's test). Every draw is seeded.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, TypeVar

from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.images import require_images
from mmq_kernels.eval.readers import find, sources
from mmq_kernels.eval.samples import CaptionSample, GqaSample, QuestionSample, RetrievalGallery, VqaSample

__all__ = [
    "CALIBRATION_SPLIT",
    "QUESTION_TASKS",
    "SPLITS",
    "TASKS",
    "CaptionSample",
    "GqaSample",
    "QuestionSample",
    "RetrievalGallery",
    "VqaSample",
    "calibration_samples",
    "default_split",
    "evaluated_images",
    "image_key",
    "load",
    "read_split",
]

TASKS = ("caption", "vqa", "gqa", "retrieval")
QUESTION_TASKS = ("vqa", "gqa")
SPLITS = {
    "caption": ("val", "test", "train"),
    "vqa": ("val", "train"),
    "gqa": ("testdev", "val", "train"),
    "retrieval": ("test", "val", "train"),
}
"""Splits of each task; the first is the one evaluated by default."""

CALIBRATION_SPLIT = "train"
_T = TypeVar("_T")


Samples = list[CaptionSample] | list[VqaSample] | list[GqaSample] | RetrievalGallery


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
        task: `caption`, `vqa`, `gqa` or `retrieval`.
        folder: the dataset's root, laid out as in this module's table.
        split: one of `SPLITS[task]`; None is `default_split`.
        limit: at most so many samples (images, for retrieval), drawn without replacement with `seed`.
        captions_per_image: of a retrieval gallery, the first so many of each image; None takes all.

    Raises:
        DataError: a file or image is missing, damaged, of another layout, or holds an id twice.
        ValueError: unknown task or split, or a limit below 1.
    """
    if captions_per_image is not None and (captions_per_image < 1 or task != "retrieval"):
        raise ValueError(
            f"captions_per_image must be at least 1 and belongs to task retrieval, got {captions_per_image} "
            f"for task {task}"
        )
    samples = _subset(read_split(task, folder, split), limit, seed)
    require_images(samples)
    return RetrievalGallery.from_samples(samples, captions_per_image) if task == "retrieval" else samples


def default_split(task: str, folder: str | Path) -> str:
    """The split that is evaluated where none is named: the task's first, and Karpathy's test of a COCO folder that
    has no val2017.

    Raises:
        ValueError: unknown task.
    """
    _known(task)
    folder = Path(folder)
    if task == "caption":
        own, karpathy = sources(task, folder, "val")[0], sources(task, folder, "test")
        if not own.here and any(source.here for source in karpathy):
            return "test"
    return SPLITS[task][0]


def read_split(task: str, folder: str | Path, split: str | None = None) -> list[Any]:
    """All samples of a split, its images unseen.

    Raises:
        DataError: a file is missing, of another layout, holds an id twice, or no sample.
        ValueError: unknown task or split.
    """
    _known(task)
    folder = Path(folder)
    split = default_split(task, folder) if split is None else split
    if split not in SPLITS[task]:
        raise ValueError(f"split of task {task} must be one of {', '.join(SPLITS[task])}, got {split!r}")
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}")
    samples = find(task, folder, split).read(folder)
    if not samples:
        raise DataError(f"the {split} split of {folder} has no samples for task {task}")
    return samples


def calibration_samples(
    task: str, folder: str | Path, count: int, seed: int = 0
) -> list[CaptionSample] | list[VqaSample] | list[GqaSample]:
    """Exactly `count` samples of the train split, drawn with `seed`: none about an image that is evaluated.

    Raises:
        DataError: the train split is missing, or has fewer samples.
    """
    folder = Path(folder)
    try:
        samples = read_split(task, folder, CALIBRATION_SPLIT)
    except DataError as error:
        raise DataError(f"{error} (calibration draws from the train split only)") from None
    evaluated = evaluated_images(task, folder)
    free = [sample for sample in samples if image_key(task, sample) not in evaluated]
    if len(free) < count:
        shared = len(samples) - len(free)
        but = f", and {shared} more about images of an evaluated split" if shared else ""
        raise DataError(f"calibration needs {count} samples, {folder} has {len(free)} in its train split{but}")
    chosen = _subset(free, count, seed)
    require_images(chosen)
    return chosen


def _known(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")


def evaluated_images(task: str, folder: Path) -> set[int | str]:
    """Keys of the images in all evaluated splits of `folder` that may share some with the split calibrated on."""
    train = find(task, folder, CALIBRATION_SPLIT)
    places = [source for split in SPLITS[task] if split != CALIBRATION_SPLIT for source in sources(task, folder, split)]
    if task in ("caption", "vqa"):  # one publisher's own files share no image
        places = [source for source in places if source.whose != train.whose]
    return {image_key(task, sample) for source in places if source.here for sample in source.read(folder)}


def image_key(task: str, sample: Any) -> int | str:
    """What one image is called in every file of its publisher: COCO's id, or the file's name."""
    return sample.image_id if task == "caption" else sample.image.name


def _subset(samples: list[_T], limit: int | None, seed: int) -> list[_T]:
    if limit is None:
        return samples
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if limit >= len(samples):
        return samples
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), limit))]
