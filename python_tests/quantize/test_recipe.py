"""The recipe grammar: what it means, that it prints what it read, and what it says of what it cannot read."""

import json

import pytest
import yaml

from mmq_kernels.quantize.recipe import Recipe, matches
from mmq_kernels.spec import QuantSpec


def test_one_line_form() -> None:
    recipe = Recipe.parse("vision=gptq:4:g64 connector/first/mlp=uniform:8 language=rtn:3:sym lm_head=16 skip=*.fc2")
    vision, connector, language, head = recipe.rules
    assert (vision.method, vision.spec) == ("gptq", QuantSpec(4, 64, False))
    assert (connector.blocks, connector.kind, connector.per_tensor) == ("first", "mlp", True)
    assert language.spec == QuantSpec(3, -1, True)
    assert head.spec is None
    assert recipe.skip == ("*.fc2",)
    assert recipe.methods == {"gptq", "uniform", "rtn"}


@pytest.mark.parametrize(("method", "granularity"), [("uniform", "tensor"), ("rtn", "channel"), ("gptq", "channel")])
def test_defaults(method, granularity) -> None:
    assert str(Recipe.parse(f"all={method}:4")) == f"all={method}:4:{granularity}:asym"


@pytest.mark.parametrize(
    "text",
    [
        "vision=gptq:4:g64 language=gptq:3:channel:sym skip=*.fc2 skip=re:.*head",
        "all/middle/attention=uniform:5 all/last=16",
        r"re:.*layers\.[0-3]\..*=rtn:8:g128",
        "vision=uniform:3:g32 connector=rtn:2:tensor",
        "language=rtn:16",
    ],
)
def test_printing_round_trips(text) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_files_hold_the_same_rules(tmp_path, suffix) -> None:
    recipe = Recipe.parse("vision=gptq:4:g64 language/last=rtn:3 skip=*.fc2")
    path = tmp_path / f"recipe{suffix}"
    content = json.loads(recipe.model_dump_json())
    path.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
    assert Recipe.parse(path) == recipe
    assert Recipe.parse(str(path)) == recipe


BAD = [
    ("", "recipe must hold at least one rule such as language=gptq:4:g64, got nothing"),
    ("vision", "recipe entries must look like vision=gptq:4:g64, got 'vision'"),
    ("vision=gptq", "bits must follow the method, as in gptq:4, got 'gptq'"),
    ("vision=gptq:1", r"bits must be an integer from 2 to 8, or 16, got '1' \(vision=gptq:1\)"),
    ("vision=gptq:9", "bits must be an integer from 2 to 8, or 16, got '9'"),
    ("vision=gptq:four", "bits must be an integer from 2 to 8, or 16, got 'four'"),
    ("vision=hqq:4", r"method must be one of uniform, rtn, gptq, gptq\+, awq, got 'hqq'"),
    ("vision=rtn:4:g0", "group_size must be -1 or a positive multiple of 8, got 0"),
    ("vision=rtn:4:g12", "group_size must be -1 or a positive multiple of 8, got 12"),
    ("vision=rtn:4:fast", "option must be gN, channel, tensor, sym or asym, got 'fast'"),
    ("vision=gptq:4:tensor", "granularity of gptq must be channel or gN, got 'tensor'"),
    ("vision/late=rtn:4", "selector must be one of first, middle, last, attention, mlp, all, got 'late'"),
    ("re:(=rtn:4", "target must be a valid regular expression, got 're:\\('"),
    ("nowhere.yaml", "recipe file nowhere.yaml does not exist"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text or "nothing" for text, _ in BAD])
def test_errors_name_field_requirement_and_value(text, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


def test_files_of_another_shape_are_named(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("rules: [{target: vision, method: rtn, bits: 4, colour: red}]")
    with pytest.raises(ValueError, match=r"recipe.yaml: rules.0.colour: extra inputs are not permitted"):
        Recipe.parse(path)
    path.write_text("rules: [")
    with pytest.raises(ValueError, match="is no valid yaml"):
        Recipe.parse(path)


def test_patterns() -> None:
    assert matches("*.fc1", "a.b.fc1")
    assert not matches("*.fc1", "a.b.fc10")
    assert matches(r"re:.*\.layers\.\d+\.fc1", "m.layers.10.fc1")
    assert not matches("re:fc1", "a.fc1")
