"""A results database as a sweep leaves it: bits of three parts by several methods, with predictions and images.

Every sample gets the same luck under every configuration, so that paired differences are small where configurations
are alike; what a configuration loses grows as bits fall, most in the language model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mmq_kernels.sweep import Result, Store, fingerprint

BITS = (3, 4, 16)
COLOURS = ("red", "green", "blue", "yellow")
HOSTILE = "<script>document.title='taken'</script><!--<img src=x onerror=alert(1)>"
WEIGHTS = {"vision": 40, "connector": 10, "language": 50}
LOSS = {"vision": 0.10, "connector": 0.01, "language": 0.30}
SKILL = {"gptq": 0.8, "awq": 1.0, "rtn": 1.6}


def quality(method: str, factors: dict[str, int]) -> float:
    """Expected score of a configuration, 1 where everything is left alone."""
    lost = sum(LOSS[part] * {16: 0.0, 4: 0.2, 3: 1.0}[bits] for part, bits in factors.items())
    return max(0.0, 1 - SKILL[method] * lost)


def fill(
    folder: Path,
    *,
    methods: Sequence[str] = ("gptq", "awq", "rtn"),
    tasks: Sequence[str] = ("caption", "vqa"),
    bits: Sequence[int] = BITS,
    samples: int = 60,
    predictions: bool = True,
    intervals: bool = False,
    model: str = "models/tiny-blip2",
    constant: Mapping[str, str] | None = None,
) -> Path:
    """Write `results.db`, predictions and images to a folder, and give the database's path.

    `constant` factors are the same in every result.
    """
    data = folder / "data"
    names = _images(data, min(samples, 12))
    with Store(folder / "results.db") as store:
        for task in tasks:
            for method in methods:
                for values in itertools.product(bits, repeat=3):
                    factors = dict(zip(WEIGHTS, values, strict=True))
                    key = fingerprint(task=task, method=method, **factors)
                    records = _records(task, method, factors, names, samples)
                    if predictions:
                        path = store.predictions(key)
                        path.parent.mkdir(exist_ok=True)
                        path.write_text("".join(json.dumps(record) + "\n" for record in records))
                    result = _result(key, task, method, factors, records, data, intervals)
                    store.add([replace(result, model=model, factors={**factors, **(constant or {})})])
    return folder / "results.db"


def _images(data: Path, count: int) -> list[str]:
    (data / "val2017").mkdir(parents=True)
    names = []
    for index in range(count):
        names.append(f"val2017/{index:06d}.png")
        Image.new("RGB", (96, 64), COLOURS[index % len(COLOURS)]).save(data / names[-1])
    return names


def _records(
    task: str, method: str, factors: dict[str, int], names: list[str], samples: int
) -> list[dict[str, object]]:
    luck = np.random.default_rng(5).random(samples)
    score = quality(method, factors)
    records: list[dict[str, object]] = []
    for index in range(samples):
        colour = COLOURS[index % len(COLOURS)]
        right = bool(luck[index] < score)
        record: dict[str, object] = {"id": index, "image": names[index % len(names)]}
        if task == "caption":
            said = f"a {colour} field" if right else HOSTILE if index % 2 else "a a a a"
            record |= {
                "caption": said,
                "cider": 1.2 if right else 0.1,
                "references": [f"a {colour} field", "one field"],
            }
        else:
            record |= {
                "question": "what colour is it?",
                "prediction": colour if right else "yes",
                "answers": [colour] * 10,
                "answer_type": "other",
                "question_type": "what colour",
                "accuracy": 1.0 if right else 0.0,
            }
        records.append(record)
    return records


def _result(
    key: str,
    task: str,
    method: str,
    factors: dict[str, int],
    records: list[dict[str, object]],
    data: Path,
    intervals: bool,
) -> Result:
    metric = "cider" if task == "caption" else "accuracy"
    value = float(np.mean([record[metric] for record in records]))  # type: ignore[arg-type]
    low = {part: bits for part, bits in factors.items() if bits != 16}
    bpw = sum(WEIGHTS[part] * bits for part, bits in factors.items()) / sum(WEIGHTS.values())
    return Result(
        fingerprint=key,
        model="models/tiny-blip2",
        task=task,
        method=method,
        factors=dict(factors),
        metrics={metric: value, "nll": 2 - quality(method, factors)},
        intervals={metric: (value - 0.05, value + 0.05)} if intervals else {},
        samples=len(records),
        data=str(data),
        recipe=" ".join(f"{part}={method}:{bits}:g64:asym" for part, bits in low.items()),
        bpw=bpw,
        bytes=round(bpw * 1e6),
        latency=0.001 * (2 + bpw / 16),
        versions={"torch": "2.13"},
    )
