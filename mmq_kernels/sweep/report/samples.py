"""Examples: what configurations said about the same images, side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmq_kernels.sweep import fronts, words
from mmq_kernels.sweep.analysis import Analysis
from mmq_kernels.sweep.predictions import Predictions
from mmq_kernels.sweep.store import Result

MOST_EXAMPLES = 8
"""Of a model and task."""
MOST_CONFIGURATIONS = 12
RECORDS_READ = 2_000
"""Of each file, its first."""
RIGHT = 0.5


@dataclass(frozen=True)
class Said:
    """What a configuration said about a sample, and its score there; `right` where that is known."""

    configuration: str
    bpw: float | None
    text: str
    score: float | None
    right: bool | None


@dataclass(frozen=True)
class Example:
    """One sample with what was said about it.

    Attributes:
        image: file of the image; None where the data's folder is not known, or the image would lie outside of it.
        name: of the image within its folder.
        question: empty for captions.
        truth: references or answers.
    """

    image: Path | None
    name: str
    question: str
    truth: str
    said: list[Said] = field(default_factory=list)


def chosen_configurations(results: Sequence[Result], analyses: Sequence[Analysis]) -> list[Result]:
    """Everything left alone, what keeps a share of the score, and of each method some of its front."""
    known = {result.fingerprint: result for result in results}
    whole = next((result for result in results if fronts.untouched(result)), None)
    kept = [point for each in analyses for point in each.keeps.values() if point is not None]
    chosen = dict.fromkeys([whole.fingerprint] if whole else [])
    chosen |= dict.fromkeys(point.fingerprint for point in kept if point.fingerprint in known)
    spread = [
        _spread([known[point.fingerprint] for point in each.front if point.fingerprint in known]) for each in analyses
    ]
    for result in itertools.chain(*itertools.zip_longest(*spread)):
        if result is not None and len(chosen) < MOST_CONFIGURATIONS:
            chosen[result.fingerprint] = None
    return sorted((known[name] for name in list(chosen)[:MOST_CONFIGURATIONS]), key=lambda result: -_bits(result))


def _spread(front: Sequence[Result]) -> list[Result]:
    """Of a front some, evenly from the cheapest on."""
    count = min(len(front), MOST_CONFIGURATIONS // 2)
    return [front[int(i)] for i in np.linspace(0, len(front) - 1, count)] if count else []


def _bits(result: Result) -> float:
    if result.bpw is not None:
        return result.bpw
    bits = fronts.result_bits(result)
    return sum(bits.values()) / len(bits) if bits else 0.0


def examples(
    results: Sequence[Result], analyses: Sequence[Analysis], predictions: Predictions
) -> tuple[list[Example], list[str]]:
    """Samples on which the configurations differ most, then the first ones, and what could not be read.

    Args:
        results: of one model and task.
        analyses: of these.
        predictions: where their records are.
    """
    there = [result for result in results if predictions.there(result.fingerprint)]
    told: dict[Any, dict[str, dict[str, Any]]] = {}
    read, problems = [], []
    for result in chosen_configurations(there, analyses):
        try:
            records = list(itertools.islice(predictions.records(result.fingerprint), RECORDS_READ))
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        read.append(result)
        for record in records:
            if _about(record) is not None and isinstance(record.get("id"), (int, str)):
                told.setdefault(record["id"], {})[result.fingerprint] = record
    full = {name: own for name, own in told.items() if len(own) == len(read)}
    order = sorted(full, key=lambda name: -_disagreement(full[name].values()))
    half = MOST_EXAMPLES // 2
    images = {name: str(next(iter(own.values())).get("image")) for name, own in full.items()}
    picked = _of_other_images(order, images, [], half)
    picked += _of_other_images(list(full), images, picked, MOST_EXAMPLES - len(picked))
    return [_example(full[name], read) for name in picked], problems


def _of_other_images(names: Sequence[Any], images: dict[Any, str], picked: Sequence[Any], most: int) -> list[Any]:
    """The first samples that are not picked yet, those first whose image was not seen before."""
    seen = {images[name] for name in picked}
    fresh = []
    for name in names:
        if images[name] not in seen:
            seen.add(images[name])
            fresh.append(name)
    others = [name for name in names if name not in picked]
    return list(dict.fromkeys([*fresh, *others]))[:most]


def _about(record: dict[str, Any]) -> str | None:
    """What a record holds that can be shown: the key of its answer, if any."""
    if record.get("kind") == "image":
        return "text_rank" if "text_rank" in record else None
    if record.get("kind") is not None:
        return None
    return next((key for key in ("prediction", "caption") if key in record), None)


def _score(record: dict[str, Any]) -> float | None:
    if record.get("kind") == "image":
        return -float(record["text_rank"])
    score = record.get("accuracy", record.get("cider"))
    return float(score) if isinstance(score, (int, float)) else None


def _disagreement(records: Iterable[dict[str, Any]]) -> float:
    scores = [score for record in records if (score := _score(record)) is not None]
    return float(np.std(scores)) if scores else 0.0


def _example(records: dict[str, dict[str, Any]], read: Sequence[Result]) -> Example:
    first_result = read[0]
    first = records[first_result.fingerprint]
    name = str(first.get("image", ""))
    best = max((score for each in records.values() if (score := _score(each)) is not None), default=None)
    return Example(
        _inside(first_result.data, name),
        name,
        str(first.get("question", "")),
        _truth(first),
        [_said(result, records[result.fingerprint], best) for result in read],
    )


def _inside(folder: str, name: str) -> Path | None:
    """The image's file, if it lies in the data's folder."""
    if not folder or not name:
        return None
    path = Path(folder) / name
    return path if path.resolve().is_relative_to(Path(folder).resolve()) else None


def _truth(record: dict[str, Any]) -> str:
    given = record.get("answers", record.get("references", []))
    values = [str(value) for value in given] if isinstance(given, list) else [str(given)]
    return " / ".join(list(dict.fromkeys(values))[:3])


def _said(result: Result, record: dict[str, Any], best: float | None) -> Said:
    about = _about(record)
    score = _score(record)
    right: bool | None = None
    if about == "text_rank":
        text, right = f"a caption of this image is at rank {int(record['text_rank']) + 1}", record["text_rank"] == 0
        score = None
    else:
        text = str(record[about]) if about is not None else ""
        if score is not None and "accuracy" in record:
            right = score > 0
        elif score is not None and best:
            right = score >= RIGHT * best
    name = f"{words.method_name(result.method)} {words.configuration(result.factors)}"
    return Said("16 bits" if fronts.untouched(result) else name, result.bpw, text, score, right)
