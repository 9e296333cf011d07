"""The demo's data sets: rendered scenes written in the publishers' own layouts.

==============  =====================================================================================================
``coco/``       ``annotations/captions_{train,val}2017.json``, ``{train,val}2017/%012d.jpg``, ``dataset_coco.json``
                (Karpathy's file, whose test split is val2017)
``vqav2/``      ``questions/v2_OpenEnded_mscoco_{train,val}2014_questions.json``,
                ``annotations/v2_mscoco_{train,val}2014_annotations.json``,
                ``{train,val}2014/COCO_{train,val}2014_%012d.jpg``
``gqa/``        ``questions/{train,testdev,val}_balanced_questions.json``, ``images/*.jpg``; all but val's are VQAv2's
``flickr30k/``  ``annotations/flickr30k_{train,test}.json``, ``dataset_flickr30k.json`` (Karpathy's file),
                ``flickr30k-images/*.jpg``
==============  =====================================================================================================

No scene is in two splits, and none is one that the shipped models were trained on.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmq_kernels.demo.samples import JPEG_QUALITY, TRAIN_SEEDS
from mmq_kernels.demo.scenes import SIDE, Question, Scene, captions, make_scene, questions, render

FORMAT = 2
"""Raise it when the same arguments begin to write something else."""

MARKER = "world.json"
"""Written last; a folder that holds it is complete."""

_SPLIT_SEEDS = 10_000_000
"""Distance between the first seeds of two splits of a world."""

_WORLD_SEEDS = 100_000_000
_MAX_SEED = TRAIN_SEEDS // _WORLD_SEEDS - 1
_HUMANS = 10
_GQA_VAL_SHARE = 3
"""GQA's val split has a scene for so many of testdev's."""

_GQA_TYPES = {
    "color": ("query", "attr"),
    "size": ("query", "attr"),
    "shape": ("query", "cat"),
    "place": ("query", "rel"),
    "two-step": ("query", "rel"),
    "background": ("query", "global"),
    "exists": ("verify", "obj"),
}
"""Structural and semantic type by kind of question; GQA asks for no counts."""


@dataclass(frozen=True)
class WorldSize:
    """How much of each data set to write.

    Attributes:
        train: scenes of each training split (calibration is drawn from these).
        images: scenes to caption, which are also those asked about (as VQAv2 asks about COCO's images).
        questions: on each of them.
        gallery: scenes of the retrieval gallery, all told apart by their captions.
    """

    train: int = 256
    images: int = 300
    questions: int = 7
    gallery: int = 500


def write_world(folder: str | Path, *, seed: int = 0, size: WorldSize = WorldSize()) -> Path:
    """Write the four data sets under `folder`; nothing to do where the same world stands already.

    Args:
        folder: made if absent; holds ``coco``, ``vqav2``, ``gqa`` and ``flickr30k`` afterwards.
        seed: 0..9, which world; different seeds share no scene.
        size: how much of it.

    Returns:
        The folder.

    Raises:
        ValueError: for a seed out of range.
        FileExistsError: when `folder` holds something that is not such a world, or another one.
    """
    if not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"seed of a world must be between 0 and {_MAX_SEED}, got {seed}")
    folder = Path(folder)
    wanted = {"format": FORMAT, "seed": seed, "size": asdict(size)}
    if folder.exists() and any(folder.iterdir()):
        marker = folder / MARKER
        if marker.is_file() and json.loads(marker.read_text()) == wanted:
            return folder
        raise FileExistsError(f"{folder} holds something else than the world asked for; remove it or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    beside.chmod(0o755)  # a temporary folder is its owner's alone
    try:
        first = [seed * _WORLD_SEEDS + split * _SPLIT_SEEDS for split in range(5)]
        train, images = _scenes(first[0], size.train), _scenes(first[1], size.images)
        _write_coco(beside / "coco", train, images)
        _write_vqav2(beside / "vqav2", train, images, size.questions, seed)
        gqa_val = _scenes(first[4], max(1, size.images // _GQA_VAL_SHARE))
        _write_gqa(beside / "gqa", beside / "vqav2", (train, images, gqa_val), size.questions, seed)
        _write_flickr30k(beside / "flickr30k", _scenes(first[2], size.train), _distinct(first[3], size.gallery))
        (beside / MARKER).write_text(json.dumps(wanted))
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _scenes(first: int, count: int) -> list[Scene]:
    return [make_scene(first + i) for i in range(count)]


def _distinct(first: int, count: int) -> list[Scene]:
    """`count` scenes from seed `first` on, no two with the same captions."""
    found: dict[tuple[str, ...], Scene] = {}
    seed = first
    while len(found) < count:
        scene = make_scene(seed)
        found.setdefault(scene.identity, scene)
        seed += 1
    return list(found.values())


def _save_image(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene).save(path, "JPEG", quality=JPEG_QUALITY, subsampling=0)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _info(what: str) -> dict[str, Any]:
    return {
        "description": f"mmq_kernels demo scenes: {what}",
        "version": "1",
        "year": 2026,
        "contributor": "mmq_kernels",
        "url": "",
        "date_created": "2026/01/01",
    }


_LICENSES = [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}]


def _write_coco(folder: Path, train: list[Scene], val: list[Scene]) -> None:
    number, karpathy = 0, []
    for split, scenes, first in (("train2017", train, 1), ("val2017", val, 500_001)):
        images, annotations = [], []
        for image_id, scene in enumerate(scenes, first):
            name = f"{image_id:012d}.jpg"
            _save_image(scene, folder / split / name)
            images.append(
                {
                    "id": image_id,
                    "file_name": name,
                    "width": SIDE,
                    "height": SIDE,
                    "license": 1,
                    "coco_url": "",
                    "flickr_url": "",
                    "date_captured": "2026-01-01 00:00:00",
                }
            )
            sentences = []
            for caption in captions(scene):
                number += 1
                annotations.append({"id": number, "image_id": image_id, "caption": caption})
                sentences.append(_sentence(caption, image_id, number))
            year = split.replace("2017", "2014")
            named = {"filepath": year, "filename": f"COCO_{year}_{name}", "cocoid": image_id}
            karpathy.append(named | _karpathy(image_id, "train" if split == "train2017" else "test", sentences))
        content = {
            "info": _info("captions"),
            "licenses": _LICENSES,
            "images": images,
            "annotations": annotations,
        }
        _write_json(folder / "annotations" / f"captions_{split}.json", content)
    _write_json(folder / "dataset_coco.json", {"dataset": "coco", "images": karpathy})


def _sentence(caption: str, image_id: int, sentence_id: int) -> dict[str, Any]:
    """A caption in Karpathy's files."""
    return {"raw": caption, "tokens": caption.replace(",", "").split(), "imgid": image_id, "sentid": sentence_id}


def _karpathy(image_id: int, split: str, sentences: list[dict[str, Any]]) -> dict[str, Any]:
    """What Karpathy's files say of an image, beside its name."""
    return {"imgid": image_id, "split": split, "sentids": [s["sentid"] for s in sentences], "sentences": sentences}


def _write_vqav2(folder: Path, train: list[Scene], val: list[Scene], asked: int, seed: int) -> None:
    for split, scenes, first in (("train2014", train, 1), ("val2014", val, 500_001)):
        common = {
            "info": _info("visual question answering"),
            "license": _LICENSES[0],
            "data_type": "mscoco",
            "data_subtype": split,
            "task_type": "Open-Ended",
        }
        rng = random.Random(f"world {seed} {split}")
        texts, answers = [], []
        for image_id, scene in enumerate(scenes, first):
            _save_image(scene, folder / split / f"COCO_{split}_{image_id:012d}.jpg")
            for number, question in enumerate(questions(scene, asked, rng)):
                key = {"image_id": image_id, "question_id": image_id * 1000 + number}
                texts.append(key | {"question": question.text})
                answers.append(key | _annotation(question))
        _write_json(
            folder / "questions" / f"v2_OpenEnded_mscoco_{split}_questions.json",
            common | {"questions": texts},
        )
        _write_json(folder / "annotations" / f"v2_mscoco_{split}_annotations.json", common | {"annotations": answers})


def _annotation(question: Question) -> dict[str, Any]:
    if question.answer in ("yes", "no"):
        kind = "yes/no"
    else:
        kind = "number" if question.kind == "count" else "other"
    said = [{"answer": question.answer, "answer_confidence": "yes", "answer_id": i + 1} for i in range(_HUMANS)]
    return {
        "question_type": question.kind,
        "answer_type": kind,
        "multiple_choice_answer": question.answer,
        "answers": said,
    }


def _write_gqa(
    folder: Path, vqav2: Path, splits: tuple[list[Scene], list[Scene], list[Scene]], asked: int, seed: int
) -> None:
    """Questions of the kinds that GQA has, about VQAv2's images; val has images of its own."""
    (folder / "images").mkdir(parents=True)
    named = (("train", "train2014", 1, ""), ("testdev", "val2014", 500_001, "n"), ("val", "", 900_001, ""))
    for (split, year, first, prefix), scenes in zip(named, splits, strict=True):
        rng = random.Random(f"gqa {split} {seed}")
        written: dict[str, Any] = {}
        for number, scene in enumerate(scenes, first):
            image_id = f"{prefix}{number}"
            path = folder / "images" / f"{image_id}.jpg"
            if year:
                _same_file(vqav2 / year / f"COCO_{year}_{number:012d}.jpg", path)
            else:
                _save_image(scene, path)
            kept = [question for question in questions(scene, asked, rng) if question.kind in _GQA_TYPES]
            written |= {f"{number:07d}{place}": _gqa_question(image_id, q) for place, q in enumerate(kept)}
        for question_id, question in written.items():
            question["equivalent"] = [question_id]
        _write_json(folder / "questions" / f"{split}_balanced_questions.json", written)


def _same_file(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


def _gqa_question(image_id: str, question: Question) -> dict[str, Any]:
    structural, semantic = _GQA_TYPES[question.kind]
    return {
        "semantic": [],
        "entailed": [],
        "equivalent": [],
        "question": f"{question.text[0].upper()}{question.text[1:]}",
        "imageId": image_id,
        "isBalanced": True,
        "groups": {"global": None, "local": question.kind},
        "answer": question.answer,
        "semanticStr": "",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": question.kind, "semantic": semantic, "structural": structural},
        "fullAnswer": f"It is {question.answer}.",
    }


def _write_flickr30k(folder: Path, train: list[Scene], test: list[Scene]) -> None:
    karpathy, sentence = [], 0
    for split, scenes, first in (("train", train, 1), ("test", test, 500_001)):
        rows = []
        for image_id, scene in enumerate(scenes, first):
            name = f"{image_id}.jpg"
            _save_image(scene, folder / "flickr30k-images" / name)
            rows.append({"image": f"flickr30k-images/{name}", "caption": list(captions(scene))})
            sentences = []
            for caption in captions(scene):
                sentences.append(_sentence(caption, image_id, sentence))
                sentence += 1
            karpathy.append({"filename": name} | _karpathy(image_id, split, sentences))
        _write_json(folder / "annotations" / f"flickr30k_{split}.json", rows)
    _write_json(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": karpathy})
