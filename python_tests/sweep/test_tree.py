"""What configurations share, counted by hand, and the shelf that bounds what is kept of it."""

from __future__ import annotations

import itertools

from mmq_kernels import checkpoint
from mmq_kernels.checkpoint.skeleton import build_skeleton
from mmq_kernels.demo import weights_folder
from mmq_kernels.models.plan import Planner
from mmq_kernels.quantize import Recipe
from mmq_kernels.sweep.shelf import Shelf
from mmq_kernels.sweep.tree import Step, depth_first, features_key, legs, shared_work, steps_of, subtrees

PLANNER = Planner(build_skeleton(checkpoint.loading.fetched(weights_folder("blip2"))))


def path(recipe: str) -> list[Step]:
    return steps_of(PLANNER.plan(Recipe.parse(recipe)))


def keys(recipe: str, component: str) -> list[str]:
    return [step.key for step in path(recipe) if step.component == component]


def test_a_calibrated_block_depends_on_what_was_quantized_before_it_and_no_other_does() -> None:
    low, high = "vision=gptq:2 language=gptq:4", "vision=gptq:3 language=gptq:4"
    assert keys(low, "vision") != keys(high, "vision")
    assert not set(keys(low, "language")) & set(keys(high, "language"))
    assert keys("language=gptq:4 vision=gptq:2", "language") == keys(low, "language"), "the order is the model's"
    low, high = "vision=rtn:2 language=rtn:4", "vision=rtn:3 language=rtn:4"
    assert keys(low, "language") == keys(high, "language")
    assert keys("vision=rtn:2 language=gptq:4", "language") != keys("vision=rtn:3 language=gptq:4", "language")
    one, other = "language/first=gptq:4 language/last=gptq:2", "language/first=gptq:4 language/last=gptq:3"
    same = [a == b for a, b in zip(keys(one, "language"), keys(other, "language"), strict=True)]
    assert same == sorted(same, reverse=True) and set(same) == {True, False}
    assert features_key(path(one)) == features_key(path(other)) == features_key([])


def test_three_by_three_by_three_by_hand() -> None:
    recipes = [
        f"vision=gptq:{v} connector=gptq:{c} language=gptq:{m}" for m in (2, 3, 4) for c in (2, 3, 4) for v in (2, 3, 4)
    ]
    paths = [path(recipe) for recipe in recipes]
    work = shared_work(paths)
    assert work.quantizations == {"vision": (3, 27), "connector": (9, 27), "language": (27, 27)}
    assert work.features == (9, 27)
    legged = {recipe: legs(steps) for recipe, steps in zip(recipes, paths, strict=True)}
    ordered = depth_first(recipes, [legged[recipe] for recipe in recipes])
    assert sorted(ordered) == sorted(recipes)
    changes = [a.split()[:2] != b.split()[:2] for a, b in itertools.pairwise(ordered)]
    assert sum(changes) == 8, "nine pairs of vision and connector, each gone through once"
    for least, count in ((1, 3), (3, 3), (4, 9), (9, 9), (10, 27), (100, 27)):
        groups = subtrees(ordered, [legged[recipe] for recipe in ordered], least)
        assert len(groups) == count and [recipe for group in groups for recipe in group] == ordered


def test_a_shelf_lets_go_of_what_was_used_least_recently() -> None:
    shelf = Shelf(10)
    for name in "abc":
        shelf.put(name, name.upper(), 3)
    assert shelf.get("a") == "A"
    shelf.put("d", "D", 3)
    assert [shelf.get(name) for name in "abcd"] == ["A", None, "C", "D"] and shelf.bytes == 9
    shelf.put("large", "L", 11)
    assert shelf.get("large") is None and len(shelf) == 3
    shelf.put("c", "C2", 4)
    assert shelf.get("c") == "C2" and shelf.bytes == 10
    shelf.drop("c")
    shelf.drop("c")
    assert shelf.bytes == 6
