"""Every family: all linears reached or listed, quantized by each method, saved, loaded and run."""

from __future__ import annotations

import family_table
import pytest
import tiny_families
import torch
import transformers
from tiny_families import TINY, logits
from torch import nn

import mmq_kernels
from mmq_kernels.models import component_prefixes, family_of, make_plan
from mmq_kernels.models.families import FAMILIES, blocks_of, component_of, discover, layer_kind
from mmq_kernels.models.plan import list_layers
from mmq_kernels.quantize import Recipe

NEWEST = transformers.__version__ >= "5"
COMPONENTS = {
    **{name: {"vision", "connector", "language"} for name in TINY},
    "llama": {"language"},
    "opt": {"language"},
    "vit": {"vision"},
    "siglip": {"vision", "language"},  # its connector has no linear, nor has that of
    "gemma3": {"vision", "language"},
}

LEFT_ALONE = {
    **{name: {"lm_head"} for name in TINY},
    "instructblip": {"language_model.lm_head"},
    "clip": set(),
    "siglip": {"text_model.head", "vision_model.head.attention.out_proj"}
    | {f"vision_model.head.mlp.fc{i}" for i in (1, 2)},
    "opt": {"lm_head", "model.decoder.project_in", "model.decoder.project_out"},
    "vit": {"classifier"},
}


@pytest.mark.parametrize("name", TINY)
def test_every_linear_is_reached_or_listed(name) -> None:
    model = TINY[name].make()
    plan = make_plan(model, Recipe.parse("all=rtn:4"))
    assert set(plan.left_alone) == LEFT_ALONE[name]
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(plan.layers) == linears - LEFT_ALONE[name]
    assert {layer.component for layer in plan.layers.values()} == COMPONENTS[name]
    assert {layer.kind for layer in list_layers(model) if layer.block_group} == {"attention", "mlp"}


@pytest.mark.parametrize("name", TINY)
def test_each_parameter_belongs_to_one_component(name) -> None:
    model = TINY[name].make()
    prefixes = component_prefixes(model)
    for parameter, _ in model.named_parameters():
        owners = [c for c, own in prefixes.items() if any(parameter == p or parameter.startswith(f"{p}.") for p in own)]
        if prefixes == {owners[0] if owners else "": ("",)}:
            continue
        assert len(owners) == 1, parameter


@pytest.mark.parametrize("name", TINY)
def test_discovery_finds_what_the_table_says(name) -> None:
    model = TINY[name].make()
    table, found = family_of(model), discover(model)
    places = [{(blocks.component, blocks.path) for blocks in blocks_of(model, family)} for family in (table, found)]
    assert places[0] == places[1]
    for parameter, _ in model.named_parameters():
        assert component_of(table, parameter) == component_of(found, parameter), parameter


def test_the_table_has_every_family() -> None:
    listed = {kind for family in FAMILIES for kind in family.model_types}
    stated = {tiny.config().model_type for tiny in TINY.values()} | {"blip-2"}
    assert stated - listed == {"llama", "opt", "vit"}  # these are discovered
    assert listed <= stated


@pytest.mark.parametrize("method", family_table.METHODS if NEWEST else ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", TINY)
def test_quantized_saved_loaded_and_run(name, method, tmp_path) -> None:
    tiny = TINY[name]
    call = tiny.calls(1)[0]
    model, report = family_table.quantized(name, method)
    with torch.no_grad():
        exact = logits(tiny.make()(**call))
        quantized = logits(model(**call))
        mmq_kernels.save(model, tmp_path / "quantized")
        loaded = logits(mmq_kernels.load(tmp_path / "quantized")(**call))
    assert report.notes == []  # calibration reached every layer
    assert all(layer.used == method for layer in report.layers)
    assert 0 < (quantized - exact).norm() < 0.6 * exact.norm()
    torch.testing.assert_close(loaded, quantized)


@pytest.mark.skipif(not NEWEST, reason="modules have other names under transformers 4")
def test_the_table_in_readme_is_what_the_families_do() -> None:
    made = family_table.table()
    assert made == family_table.in_readme(), "python python_tests/models/family_table.py writes it"
    assert made.count("\n") > 20


def test_a_base_model_without_its_head_is_the_same_family() -> None:
    model = transformers.LlavaModel(tiny_families.TINY["llava"].config())
    assert {layer.component for layer in list_layers(model)} == {"vision", "connector", "language"}
    assert not [layer for layer in list_layers(model) if layer.reason]


def test_no_rule_reaches_what_torch_reads_itself() -> None:
    model = TINY["siglip"].make()
    with pytest.raises(ValueError, match=r"'\*\.out_proj\*' is no component|matches no layer|selects no layer"):
        make_plan(model, Recipe.parse("vision_model.head.attention.out_proj=rtn:4"))
    plan = make_plan(model, Recipe.parse("vision_model.head.*=rtn:4"))
    assert set(plan.layers) == {"vision_model.head.mlp.fc1", "vision_model.head.mlp.fc2"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("self_attn.qkv", "attention"), ("cross_attn.q_proj", "attention"), ("mlp.fc1", "mlp"), ("output.dense", "mlp")],
)
def test_kinds(name, kind) -> None:
    assert layer_kind(name) == kind
