"""Units, the recipes that allocations become, and what they weigh."""

from __future__ import annotations

import random

import pytest
from tiny_families import TINY
from torch import nn

from mmq_kernels.eval import model_size
from mmq_kernels.models import make_plan, quantize_model
from mmq_kernels.quantize import GptqSettings, Recipe
from mmq_kernels.spec import QuantSpec
from mmq_kernels.sweep.allocation.units import (
    Choice,
    choices_of,
    grouped,
    linear_of,
    named,
    packed_bits,
    recipe_of,
    units_of,
)

SOME = ("instructblip", "llava", "qwen2_5_vl", "clip", "opt", "vit")
CHOICES: list[Choice] = [QuantSpec(2, 8), QuantSpec(3), QuantSpec(4, 16, True), QuantSpec(8, 8), None]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {family: TINY[family].make() for family in SOME}


@pytest.mark.parametrize("per", ["block", "kind"])
@pytest.mark.parametrize("family", SOME)
def test_a_recipe_gives_each_layer_its_units_choice(family: str, per: str, models: dict[str, nn.Module]) -> None:
    model, rng = models[family], random.Random(0)
    units = units_of(model, per)
    chosen = [rng.choice(CHOICES) for _ in units]
    recipe = recipe_of(units, chosen, "rtn")
    plan = make_plan(model, Recipe.parse(str(recipe)))
    wanted = {layer: choice for unit, choice in zip(units, chosen, strict=True) for layer in unit.layers}
    assert {name: layer.spec for name, layer in plan.layers.items()} == {k: v for k, v in wanted.items() if v}
    everything = make_plan(model, Recipe.parse("all=rtn:4")).layers
    assert wanted.keys() == everything.keys()
    assert sum(unit.weights for unit in units) == sum(linear_of(model, name).weight.numel() for name in everything)


@pytest.mark.parametrize("method", ["rtn", "gptq+"])
def test_what_a_unit_weighs_is_what_it_takes(method: str) -> None:
    """The bits foretold of each unit are those that the quantized model has more or less, one by one."""
    family = TINY["llava"]
    for number, choice in enumerate(CHOICES):
        model = family.make()
        unit = units_of(model, "kind")[number]
        foretold = packed_bits(model, unit, choice, method, GptqSettings(), 16)
        before = model_size(model, float_bits=16).weight_bits
        quantize_model(model, Recipe(rules=(unit.rule(method, choice),)), family.calls(2))
        assert model_size(model, float_bits=16).weight_bits - before == foretold - 16 * unit.weights


def test_kinds_part_a_block_and_a_projector_stays_whole(models: dict[str, nn.Module]) -> None:
    units = units_of(models["llava"], "kind")
    names = [unit.name for unit in units]
    assert "model.language_model.layers.0/attention" in names
    assert "model.language_model.layers.0/mlp" in names
    assert "model.multi_modal_projector" in names
    assert str(units[0].rule("gptq", QuantSpec(3, 64))) == f"{units[0].block}.*/attention=gptq:3:g64:asym"


def test_components_are_groups_of_units(models: dict[str, nn.Module]) -> None:
    units = units_of(models["llava"])
    groups = grouped(units, "component")
    assert sorted(index for group in groups for index in group) == list(range(len(units)))
    assert [{units[index].component for index in group} for group in groups] == [
        {"vision"},
        {"connector"},
        {"language"},
    ]
    assert grouped(units, "block") == [[index] for index in range(len(units))]
    only = units_of(models["llava"], components=["language"])
    assert {unit.component for unit in only} == {"language"}


def test_choices_in_order_and_without_repeats() -> None:
    assert [named(choice) for choice in choices_of([16, 3, 2, 3], [64, -1, 64], True)] == [
        "2bit:g64:sym",
        "2bit:channel:sym",
        "3bit:g64:sym",
        "3bit:channel:sym",
        "16",
    ]


def test_mistakes_are_named(models: dict[str, nn.Module]) -> None:
    with pytest.raises(
        ValueError, match="no component 'audio' to allocate bits to; it has vision, connector, language"
    ):
        units_of(models["llava"], components=["audio"])
    with pytest.raises(ValueError, match=r"no component 'language' .* it has vision"):
        units_of(models["vit"], components=["language"])
    with pytest.raises(ValueError, match="per must be one of component, block, kind, got 'layer'"):
        units_of(models["llava"], "layer")
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 9"):
        choices_of([9], [64], False)
    with pytest.raises(ValueError, match="group_size must be -1 or a positive multiple of 8, got 12"):
        choices_of([4], [12], False)
    with pytest.raises(ValueError, match=r"must name at least one each, got \[\] and \[64\]"):
        choices_of([], [64], False)
