"""What is shared changes no number: configurations measured together score what `mmq quantize` and `mmq eval` give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmq_kernels import checkpoint
from mmq_kernels import eval as evaluation
from mmq_kernels.sweep import Grid
from mmq_kernels.sweep.workbench import Measured, Work, Workbench

RECIPES = (
    "",
    "vision=gptq:3:g64 connector=gptq:3:g64 language=gptq:3:g64",
    "vision=gptq:3:g64 connector=awq:3:g64 language=gptq:3:g64",
    "vision=gptq:3:g64 connector=awq:3:g64 language=rtn:3:g64 *.lm_head=rtn:4:g64",
    "vision/first/attention=uniform:3 connector=uniform:4 language/middle=gptq+:3:g32 language/last=gptq:2:g64",
    "vision/first/attention=uniform:3 connector=uniform:4 language/middle=gptq+:3:g32 language/last=gptq:3:channel:sym",
)


def measured(bench: Workbench, recipes: tuple[str, ...]) -> dict[tuple[str, str], Measured]:
    bench.expect(recipes)
    return {(m.recipe, m.task): m for _, m in bench.measure([Work(recipe, ("caption", "vqa")) for recipe in recipes])}


def plain(found: Measured) -> tuple[Any, ...]:
    return found.metrics, found.intervals, found.samples, found.bpw, found.bytes, list(found.records)


def separately(grid: Grid, recipe: str, folder: Path) -> dict[str, tuple[Any, ...]]:
    """By the commands' own functions, through a checkpoint on disk."""
    if recipe:
        checkpoint.quantize_checkpoint(grid.model, recipe, folder, calibration=grid.source())
    source = folder if recipe else Path(grid.model)
    processor, found = checkpoint.load_processor(source), {}
    model = checkpoint.load(source)
    for task, own in grid.tasks.items():
        data = evaluation.prepare(task, own.data, processor, limit=own.limit, tokenizer="plain")
        result = evaluation.evaluate_prepared(model, data, options=grid.evaluation.options())
        size = evaluation.model_size(model)
        metrics = {name: value for name, value in result.metrics.items() if value is not None}
        intervals = {name: (each.low, each.high) for name, each in result.intervals.items()}
        records = result.to_json()["records"]
        found[task] = metrics, intervals, result.samples, size.bpw, size.memory_bytes, records
    return found


@pytest.fixture(scope="module")
def grid(content: dict[str, Any]) -> Grid:
    return Grid.of(content)


def test_numbers_are_those_of_separate_runs(grid: Grid, tmp_path: Path) -> None:
    with Workbench(grid) as bench:
        before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
        together = measured(bench, RECIPES)
        after = bench.model.state_dict()
    assert not [found.error for found in together.values() if found.error]
    for recipe in RECIPES:
        for task, expected in separately(grid, recipe, tmp_path / str(RECIPES.index(recipe))).items():
            assert plain(together[recipe, task]) == expected, (recipe, task)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "the model is what it was"


def test_a_recipe_that_fails_is_told_and_the_others_go_on(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmq_kernels.sweep import workbench

    evaluate, calls = evaluation.evaluate_prepared, []

    def failing(*args: Any, **options: Any) -> evaluation.EvalResult:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return evaluate(*args, **options)

    monkeypatch.setattr(workbench.evaluation, "evaluate_prepared", failing)
    with Workbench(grid) as bench:
        found = measured(bench, ("", "language=rtn:2:g64"))
    errors = {key: each.error for key, each in found.items() if each.error}
    assert errors == {("", "vqa"): "RuntimeError: out of memory"}
    assert len(found) == 4 and found["language=rtn:2:g64", "vqa"].samples == 8
