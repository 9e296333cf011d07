"""What a data folder is good for: which splits of which task are there, whole, and what each is used for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmq_kernels.eval.datasets import CALIBRATION_SPLIT, SPLITS, TASKS, evaluated_images, image_key
from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.images import image_faults, uses
from mmq_kernels.eval.readers import find, sources

OPENED = 64
"""Images opened a split, unless all are asked for."""


@dataclass(frozen=True)
class SplitReport:
    """One split of a task in one folder.

    Attributes:
        use: `evaluation` or `calibration`.
        files: annotation files that hold it, or the first that is missed.
        here: whether they are there.
        samples, images: how many.
        images_missing, images_opened, images_damaged: of `images`.
        set_aside: samples that calibration never draws, their images being evaluated.
        problems: what is wrong, a line each; none where the split can be used.
    """

    task: str
    folder: str
    split: str
    use: str
    files: tuple[str, ...]
    here: bool
    samples: int = 0
    images: int = 0
    images_missing: int = 0
    images_opened: int = 0
    images_damaged: int = 0
    set_aside: int = 0
    problems: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether the split is there, and nothing is wrong with it."""
        return self.here and not self.problems


@dataclass(frozen=True)
class FolderReport:
    """A folder and the data sets in it and right under it."""

    folder: str
    splits: tuple[SplitReport, ...]

    def tasks(self, use: str) -> list[str]:
        """Tasks that have a usable split for `use`."""
        return [task for task in TASKS if any(s.usable and s.use == use for s in self.splits if s.task == task)]

    def why_not(self, task: str) -> str:
        """Why `task` cannot be evaluated, on one line."""
        own = [split for split in self.splits if split.task == task and split.use == "evaluation"]
        wrong = [problem for split in own for problem in split.problems]
        return wrong[0] if wrong else f"missing {own[0].files[0]}"

    def to_json(self) -> dict[str, Any]:
        """Plain values that `json` can write."""
        return {
            "folder": self.folder,
            "evaluation": self.tasks("evaluation"),
            "calibration": self.tasks("calibration"),
            "splits": [asdict(split) | {"usable": split.usable} for split in self.splits],
        }


def check_folder(
    folder: str | Path, tasks: Sequence[str] = TASKS, *, all_images: bool = False, seed: int = 0
) -> FolderReport:
    """Looks for data sets in `folder` and in the folders right under it, reads every split and opens images.

    Args:
        tasks: to look for.
        all_images: open every image; else a draw of `OPENED` a split, with `seed`.

    Raises:
        DataError: no such folder.
        ValueError: unknown task.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {unknown[0]!r}")
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = []
    for task in tasks:
        own = [place for place in places if _has_any(task, place)]
        for place in own or [folder]:
            found += [_check_split(task, place, split, all_images, seed) for split in SPLITS[task]]
    return FolderReport(str(folder), tuple(found))


def _has_any(task: str, place: Path) -> bool:
    return any(file.is_file() for split in SPLITS[task] for s in sources(task, place, split) for file in s.files)


def _drawn(paths: list[Path], seed: int) -> list[Path]:
    """At most `OPENED` of `paths`, in their order."""
    chosen = random.Random(seed).sample(range(len(paths)), min(OPENED, len(paths)))
    return [paths[i] for i in sorted(chosen)]


def _check_split(task: str, folder: Path, split: str, all_images: bool, seed: int) -> SplitReport:
    use = "calibration" if split == CALIBRATION_SPLIT else "evaluation"
    places = sources(task, folder, split)
    if not any(source.here for source in places):
        return SplitReport(task, str(folder), split, use, (str(places[0].files[0]),), here=False)
    source = find(task, folder, split)
    files = tuple(str(path) for path in source.files)
    try:
        samples = source.read(folder)
        if not samples and source.whose:  # Karpathy's files need not have every split
            return SplitReport(task, str(folder), split, use, files, here=False)
        if not samples:
            raise DataError(f"{files[0]} has no samples")
        shared = evaluated_images(task, folder) if use == "calibration" else set()
    except DataError as error:
        return SplitReport(task, str(folder), split, use, files, here=True, problems=(str(error),))
    paths = list(dict.fromkeys(sample.image for sample in samples))
    missing = [path for path in paths if not path.is_file()]
    there = [path for path in paths if path not in set(missing)]
    opened = there if all_images else _drawn(there, seed)
    damaged = {path: why for path, why in zip(opened, image_faults(opened), strict=True) if why}
    problems = []
    if missing:
        problems.append(f"no image {missing[0]}{uses(samples, missing, len(paths))}")
    if damaged:
        first = next(iter(damaged))
        problems.append(f"{damaged[first]}{uses(samples, list(damaged), len(opened))}")
    return SplitReport(
        task,
        str(folder),
        split,
        use,
        files,
        here=True,
        samples=len(samples),
        images=len(paths),
        images_missing=len(missing),
        images_opened=len(opened),
        images_damaged=len(damaged),
        set_aside=sum(image_key(task, sample) in shared for sample in samples),
        problems=tuple(problems),
    )
