"""What a recipe means for a model: every linear reached or listed, thirds, kinds, patterns, errors."""

import pytest
import torch
from tiny_vlms import KINDS, make
from torch import nn

from mmq_kernels.models import component_prefixes, family_of, make_plan
from mmq_kernels.models.plan import block_group, list_layers
from mmq_kernels.quantize import Recipe


def plan(kind: str, text: str):
    return make_plan(make(kind), Recipe.parse(text))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_is_reached_or_listed_with_a_reason(kind) -> None:
    model = make(kind)
    got = make_plan(model, Recipe.parse("all=rtn:4"))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(got.layers) | set(got.left_alone) == linears
    assert not set(got.layers) & set(got.left_alone)
    assert all(got.left_alone.values())
    heads = {"opt": {"language_model.lm_head"}, "t5": {"language_model.lm_head"}, "itm": {"itm_head"}}
    assert set(got.left_alone) == heads[kind]
    assert {job.name for stage in got.stages for jobs in stage.jobs for job in jobs} == set(got.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_each_component_has_its_parts(kind) -> None:
    layers = list_layers(make(kind))
    expected = {"vision", "connector"} | ({"language"} if kind != "itm" else set())
    assert {layer.component for layer in layers} == expected
    attention = {layer.name for layer in layers if layer.kind == "attention"}
    assert "qformer.encoder.layer.0.crossattention.output.dense" in attention
    assert "qformer.encoder.layer.1.attention.attention.query" in attention
    mlp = {layer.name for layer in layers if layer.kind == "mlp"}
    assert {"qformer.encoder.layer.0.output_query.dense", "qformer.encoder.layer.0.intermediate.dense"} <= mlp
    assert "vision_model.encoder.layers.0.mlp.fc1" in mlp


def test_t5_reaches_encoder_decoder_and_cross_attention() -> None:
    layers = plan("t5", "language=rtn:4").layers
    assert "language_model.encoder.block.0.layer.1.DenseReluDense.wi_0" in layers
    assert "language_model.decoder.block.1.layer.1.EncDecAttention.k" in layers


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12, 32, 39])
def test_thirds_are_in_order_and_as_equal_as_can_be(count) -> None:
    groups = [block_group(i, count) for i in range(count)]
    assert groups == sorted(groups, key=["first", "middle", "last"].index)
    sizes = [groups.count(name) for name in ("first", "middle", "last")]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_selection_by_blocks_and_kind() -> None:
    names = set(plan("opt", "vision/first/attention=rtn:4").layers)
    assert names == {
        "vision_model.encoder.layers.0.self_attn.qkv",
        "vision_model.encoder.layers.0.self_attn.projection",
    }
    projections = plan("opt", "connector=rtn:4").layers.keys() - plan("opt", "connector/attention=rtn:4").layers.keys()
    assert "language_projection" in projections
    assert "language_projection" not in plan("opt", "connector/mlp=rtn:4").layers


def test_later_rules_override_and_skip_wins() -> None:
    got = plan("opt", "all=rtn:4:g8 *.fc1=rtn:2:g8 vision/middle=16 skip=*.layers.0.mlp.fc1")
    assert got.layers["language_model.model.decoder.layers.0.fc1"].spec.bits == 2
    assert got.layers["language_model.model.decoder.layers.0.fc2"].spec.bits == 4
    assert "vision_model.encoder.layers.0.mlp.fc1" in got.left_alone
    assert got.left_alone["vision_model.encoder.layers.0.mlp.fc1"] == "skip=*.layers.0.mlp.fc1"


def test_blocks_behind_the_last_planned_one_are_not_walked() -> None:
    (stage,) = plan("opt", "vision/first=gptq:4:g8").stages
    assert stage.blocks == ("vision_model.encoder.layers.0",)


def test_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = KINDS["opt"]()
    assert len(make_plan(model, Recipe.parse("all=rtn:4")).layers) == len(plan("opt", "all=rtn:4").layers)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("itm", "language=rtn:4", "the model has no component 'language' .*; it has vision, connector"),
        ("opt", "*.fc3=rtn:4", r"'\*\.fc3' is no component .* and matches no layer .*nearest: .*fc"),
        ("opt", "visoin=rtn:4", r"'visoin' is no component \(vision, connector, language\)"),
        ("opt", "all=rtn:4 skip=*.gate", r"skip=\*\.gate matches no layer; nearest: "),
    ],
)
def test_what_matches_nothing_is_an_error(kind, text, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan(kind, text)


def test_unknown_classes_are_named() -> None:
    with pytest.raises(ValueError, match="models of class Linear are not supported: only those of transformers"):
        family_of(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_cover_every_parameter_once(kind) -> None:
    model = make(kind)
    prefixes = component_prefixes(model)
    for name, _ in model.named_parameters():
        owners = [c for c, own in prefixes.items() if any(name == p or name.startswith(f"{p}.") for p in own)]
        assert len(owners) == 1, name
