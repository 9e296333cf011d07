"""What configurations have in common: each is a path of quantized blocks, and paths that begin alike share that part.

A block that is calibrated depends on all that was quantized before it, one that is not on nothing. So each block of a
configuration has a key: equal keys, equal bits. Configurations are gone through depth first, so that what a path has
in common with the one before it is still there.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmq_kernels.models.plan import Plan
from mmq_kernels.quantize.recipe import CALIBRATED
from mmq_kernels.quantize.walk import Stage

LANGUAGE = "language"
START = ""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Step:
    """One block of a configuration, with layers to quantize.

    Attributes:
        stage: index in the plan.
        index: of the block in its stage.
        block: its name.
        component: of its layers.
        calibrated: whether it depends on what was quantized before it.
        before: key of all that was.
        key: of what becomes of it.
        after: key of all up to and with it.
    """

    stage: int
    index: int
    block: str
    component: str
    calibrated: bool
    before: str
    key: str
    after: str


def steps_of(plan: Plan) -> list[Step]:
    """The path of a plan."""
    path, found = START, []
    for number, stage in enumerate(plan.stages):
        for index, (block, jobs) in enumerate(zip(stage.blocks, stage.jobs, strict=True)):
            if not jobs:
                continue
            calibrated = any(job.method in CALIBRATED for job in jobs)
            own = _digest(block, *map(str, jobs))
            after = _digest(path, own)
            component = plan.layers[jobs[0].name].component or ""
            key = after if calibrated else own
            found.append(Step(number, index, block, component, calibrated, path, key, after))
            path = after
    return found


def node(stage: Stage, step: Step) -> tuple[Any, ...]:
    """Where a walk stands before a step: equal for steps that can go on from the same recorded activations."""
    return stage.blocks, step.index, step.before


def features_key(steps: Sequence[Step]) -> str:
    """Equal where the language model sees the same of an image."""
    return _digest(*(step.key for step in steps if step.component != LANGUAGE))


def legs(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """The path by components: each with the key of all up to its last block in a row."""
    found: list[tuple[str, str]] = []
    for step in steps:
        if found and found[-1][0] == step.component:
            found.pop()
        found.append((step.component, step.after))
    return found


def depth_first(items: Iterable[_T], paths: Iterable[Sequence[Hashable]]) -> list[_T]:
    """`items` so ordered that those whose paths begin alike are neighbours, else as they come."""
    root: dict[Any, Any] = {}
    for item, path in zip(items, paths, strict=True):
        place = root
        for key in path:
            place = place.setdefault(key, {})
        place.setdefault(None, []).append(item)

    def leaves(place: dict[Any, Any]) -> Iterator[_T]:
        for key, below in place.items():
            if key is None:
                yield from below
            else:
                yield from leaves(below)

    return list(leaves(root))


def subtrees(items: Sequence[_T], paths: Sequence[Sequence[Hashable]], least: int) -> list[list[_T]]:
    """`items` in groups whose paths begin alike, as long beginnings as it takes to have `least` groups or one each.

    Args:
        items, paths: depth first.
    """
    deepest = max((len(path) for path in paths), default=0)
    for depth in range(1, deepest + 1):
        groups: dict[tuple[Hashable, ...], list[_T]] = {}
        for item, path in zip(items, paths, strict=True):
            groups.setdefault(tuple(path[:depth]), []).append(item)
        if len(groups) >= min(least, len(items)):
            return list(groups.values())
    return [[item] for item in items]


@dataclass(frozen=True)
class SharedWork:
    """What a set of configurations takes, and what it would take one by one.

    Attributes:
        quantizations: by component, how often it is quantized, and how often without sharing.
        features: how often images go through vision and connector, and how often without sharing.
    """

    quantizations: dict[str, tuple[int, int]]
    features: tuple[int, int]


def shared_work(paths: Sequence[Sequence[Step]]) -> SharedWork:
    """Counted over whole configurations, whatever is done already."""
    distinct: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    alone: dict[str, int] = defaultdict(int)
    for steps in paths:
        for component in dict.fromkeys(step.component for step in steps):
            distinct[component].add(tuple(step.key for step in steps if step.component == component))
            alone[component] += 1
    seen = {features_key(steps) for steps in paths}
    return SharedWork({name: (len(keys), alone[name]) for name, keys in distinct.items()}, (len(seen), len(paths)))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:24]
