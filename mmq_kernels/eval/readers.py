"""One reader for each publisher's layout: annotation files in, samples out, errors that name file and id.

A split may stand in several files (COCO's own or Karpathy's): `sources` lists them, the preferred one first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.json_files import entries, field, keyed_entries, read_json, unique
from mmq_kernels.eval.samples import CaptionSample, GqaSample, VqaSample

VQA_ANSWERS = 10
"""Human answers a VQAv2 question carries."""

_FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
_GQA_KEYS = frozenset({"question", "answer", "imageId", "types", "isBalanced"})
_YEARS = ("train2017", "val2017")


@dataclass(frozen=True)
class Source:
    """Annotation files that together hold a split.

    Attributes:
        files: all are needed; the first tells whether the source is there.
        splits: what the split is called inside the files; empty where the files are the split.
        reader: makes samples of (folder, source).
        whose: `Karpathy's ` where the files are not the data's publisher's own.
    """

    files: tuple[Path, ...]
    splits: tuple[str, ...]
    reader: Callable[[Path, Source], list[Any]]
    whose: str = ""

    @property
    def here(self) -> bool:
        """Whether the first file is."""
        return self.files[0].is_file()

    def read(self, folder: Path) -> list[Any]:
        """All samples, in the order of the file.

        Raises:
            DataError: a file is missing, of another layout, or holds an id twice.
        """
        return self.reader(folder, self)


def sources(task: str, folder: Path, split: str) -> list[Source]:
    """Where `split` of `task` may stand under `folder`, the preferred place first."""
    return _SOURCES[task](folder, split)


def find(task: str, folder: Path, split: str) -> Source:
    """The source of a split that is there.

    Raises:
        DataError: none is; names the first file of each.
    """
    places = sources(task, folder, split)
    found = next((source for source in places if source.here), None)
    if found is None:
        others = "".join(f" (or {source.whose}{source.files[0]})" for source in places[1:2])
        raise DataError(f"missing {places[0].files[0]}{others}")
    return found


# --- COCO captions ----------------------------------------------------------------------------------------------------


def _caption_sources(folder: Path, split: str) -> list[Source]:
    inside = {"train": ("train", "restval")}.get(split, (split,))
    karpathy = _karpathy_sources(folder, "coco", inside, _coco_karpathy)
    if split == "test":  # COCO's own test captions were never published
        return karpathy
    own = folder / "annotations" / f"captions_{split}2017.json"
    return [Source((own,), (), _coco_captions), *karpathy]


def _karpathy_sources(
    folder: Path, name: str, splits: tuple[str, ...], reader: Callable[[Path, Source], list[Any]]
) -> list[Source]:
    files = (place / f"dataset_{name}.json" for place in (folder, folder / "annotations"))
    return [Source((path,), splits, reader, "Karpathy's ") for path in files]


def _coco_captions(folder: Path, source: Source) -> list[CaptionSample]:
    (path,) = source.files
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
    images = folder / path.stem.removeprefix("captions_")
    return [
        CaptionSample(image_id, images / names[image_id], tuple(texts))
        for image_id, texts in references.items()
        if texts
    ]


def _coco_karpathy(folder: Path, source: Source) -> list[CaptionSample]:
    """The images stand where Karpathy's file says (COCO's 2014 folders), or in COCO's 2017 folders."""
    (path,) = source.files
    return [
        CaptionSample(
            field(entry, "cocoid", int, path),
            _coco_image(folder, field(entry, "filepath", str, path), entry["filename"], entry["cocoid"]),
            _sentences(entry, path),
        )
        for entry in _karpathy_entries(source)
    ]


def _coco_image(folder: Path, filepath: str, filename: str, coco_id: int) -> Path:
    named = folder / filepath / filename
    if named.is_file():
        return named
    renamed = (folder / year / f"{coco_id:012d}.jpg" for year in _YEARS)
    return next((place for place in renamed if place.is_file()), named)


def _karpathy_entries(source: Source) -> list[dict[str, Any]]:
    (path,) = source.files
    listed = unique(entries(read_json(path), "images", path), "filename", path)
    return [entry for entry in listed if field(entry, "split", str, path) in source.splits]


def _sentences(entry: dict[str, Any], path: Path) -> tuple[str, ...]:
    texts = tuple(field(sentence, "raw", str, path) for sentence in entries(entry, "sentences", path))
    if not texts:
        raise DataError(f"{path}: image {entry['filename']} has no captions")
    return texts


# --- VQAv2 ------------------------------------------------------------------------------------------------------------


def _vqa_sources(folder: Path, split: str) -> list[Source]:
    year = f"{split}2014"
    questions = folder / "questions" / f"v2_OpenEnded_mscoco_{year}_questions.json"
    answers = folder / "annotations" / f"v2_mscoco_{year}_annotations.json"
    return [Source((questions, answers), (year,), _vqav2)]


def _vqav2(folder: Path, source: Source) -> list[VqaSample]:
    question_path, answer_path = source.files
    (year,) = source.splits
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
        image_id = field(question, "image_id", int, question_path)
        if annotation.get("image_id", image_id) != image_id:
            raise DataError(
                f"{answer_path}: question {question_id} is about image {annotation['image_id']}, "
                f"in {question_path} about image {image_id}"
            )
        answers = tuple(field(a, "answer", str, answer_path) for a in entries(annotation, "answers", answer_path))
        if len(answers) != VQA_ANSWERS:
            raise DataError(f"{answer_path}: question {question_id} needs {VQA_ANSWERS} answers, has {len(answers)}")
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


# --- GQA --------------------------------------------------------------------------------------------------------------


def _gqa_sources(folder: Path, split: str) -> list[Source]:
    return [Source((folder / "questions" / f"{split}_balanced_questions.json",), (), _gqa)]


def _gqa(folder: Path, source: Source) -> list[GqaSample]:
    """Questions by id; of each, what is not needed is dropped while reading, for the training file is large."""
    (path,) = source.files
    samples = []
    for question_id, entry in keyed_entries(path, _GQA_KEYS, "imageId").items():
        if entry.get("isBalanced") is False:  # GQA's scorer counts balanced questions alone
            continue
        for key in ("question", "imageId"):
            field(entry, key, str, path, question_id)
        answer = field(entry, "answer", str, path, question_id)
        if not answer.strip():
            raise DataError(f"{path}: question {question_id} has an empty answer")
        types = entry.get("types")
        types = types if isinstance(types, dict) else {}
        samples.append(
            GqaSample(
                question_id,
                folder / "images" / f"{entry['imageId']}.jpg",
                entry["question"],
                answer,
                str(types.get("structural") or ""),
                str(types.get("semantic") or ""),
            )
        )
    return samples


# --- Flickr30k --------------------------------------------------------------------------------------------------------


def _retrieval_sources(folder: Path, split: str) -> list[Source]:
    own = Source((folder / "annotations" / f"flickr30k_{split}.json",), (), _flickr30k_list)
    return [own, *_karpathy_sources(folder, "flickr30k", (split,), _flickr30k_karpathy)]


def _flickr30k_list(folder: Path, source: Source) -> list[CaptionSample]:
    """`[{image, caption}]`: a list of captions an image, or (train) one caption an entry, image by image."""
    (path,) = source.files
    captions: dict[str, list[str]] = {}
    for entry in entries(read_json(path), None, path):
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


def _flickr30k_karpathy(folder: Path, source: Source) -> list[CaptionSample]:
    (path,) = source.files
    images = _karpathy_entries(source)
    names = [field(entry, "filename", str, path) for entry in images]
    locate = _flickr_locator(folder, names)
    return [
        CaptionSample(name, locate / name, _sentences(entry, path)) for name, entry in zip(names, images, strict=True)
    ]


def _flickr_locator(folder: Path, names: Iterable[str]) -> Path:
    """The folder that image names are relative to: the root, or one of the usual image folders."""
    first = next(iter(names), None)
    places = [folder, *(folder / name for name in _FLICKR_FOLDERS)]
    return next((place for place in places if first is not None and (place / first).is_file()), folder)


_SOURCES: dict[str, Callable[[Path, str], list[Source]]] = {
    "caption": _caption_sources,
    "vqa": _vqa_sources,
    "gqa": _gqa_sources,
    "retrieval": _retrieval_sources,
}
