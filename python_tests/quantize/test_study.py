"""The study's own configuration files become the recipes that they describe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_vlms import batches, make

from mmq_kernels.models import quantize_model
from mmq_kernels.quantize import GptqSettings, Recipe, read_study_config
from mmq_kernels.quantize.study import study_recipe

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "seed_configs"
FILES = sorted(SHARED.glob("*.json")) if SHARED.is_dir() else []


def written(folder: Path, text: str) -> Path:
    path = folder / "config.json"
    path.write_text(text)
    return path


@pytest.mark.skipif(not FILES, reason=f"no samples of the study's files in {SHARED}")
def test_every_sample_is_read() -> None:
    for path in FILES:
        recipe, _ = read_study_config(path)
        assert bool(recipe.rules) == (path.name != "uniform_1699.json"), path.name
        if recipe.rules:
            assert Recipe.parse(str(recipe)) == recipe, path.name


def test_uniform_is_per_tensor_by_part_third_and_kind(tmp_path) -> None:
    entries = [
        {"model_part": "VIT", "layer_group": "FIRST", "layer_type": "BOTH", "num_bits": 5},
        {"model_part": "QFORMER", "layer_group": "ALL", "layer_type": "ATTENTION", "num_bits": 3},
        {"model_part": "LLM", "layer_group": "LAST", "layer_type": "MLP", "num_bits": 16},
    ]
    recipe, settings = read_study_config(written(tmp_path, json.dumps(entries)))
    assert str(recipe) == (
        "vision/first/attention=uniform:5:tensor:asym vision/first/mlp=uniform:5:tensor:asym "
        "connector/attention=uniform:3:tensor:asym language/last/mlp=16"
    )
    assert settings == GptqSettings() and not recipe.calibrated


def test_gptq_takes_its_settings_along(tmp_path) -> None:
    part = {"bits": 4, "percent_dampening": 0.05, "group_size": 64, "use_symmetric": False, "use_act_order": True}
    content = {"vision": part, "qformer": part | {"bits": 16}, "language": part | {"bits": 3}}
    recipe, settings = read_study_config(written(tmp_path, json.dumps(content)))
    assert str(recipe) == (
        "vision/attention=gptq:4:g64:asym vision/mlp=gptq:4:g64:asym connector/attention=16 connector/mlp=16 "
        "language/attention=gptq:3:g64:asym language/mlp=gptq:3:g64:asym"
    )
    assert settings == GptqSettings(0.05, "activation")


def test_awq_with_trailing_commas_reaches_the_layers_that_it_names(tmp_path) -> None:
    text = """{
        "vit_layers": {"self_attn": 4, "fc2": 4,},
        "qformer_layers": {
            "self_attn": 3, "self_attn_output": 3, "cross_attn": 16, "output_query": 5, "output_txt": 6,
        },
    }"""
    recipe, _ = read_study_config(written(tmp_path, text))
    model = make("itm")
    report = quantize_model(model, recipe, batches(model, 2))
    found = {row.name: row.bits for row in report.layers}
    blocks = {name.split(".")[3] for name in found if name.startswith("vision_model")}
    assert blocks and all(
        found[f"vision_model.encoder.layers.{i}.{end}"] == 4 for i in blocks for end in ("self_attn.qkv", "mlp.fc2")
    )
    ends = {name.partition(".layer.")[2].partition(".")[2]: bits for name, bits in found.items() if "qformer" in name}
    assert ends == {
        "attention.attention.query": 3,
        "attention.attention.key": 3,
        "attention.attention.value": 3,
        "attention.output.dense": 3,
        "output_query.dense": 5,
        "output.dense": 6,
    }
    assert {row.group_size for row in report.layers} == {128} and not any(row.symmetric for row in report.layers)


BAD = [
    ("{", "is no valid JSON"),
    ('"vision=rtn:4"', "a configuration must be a list, or an object with the keys vision, .*, got str"),
    ("{}", "must be a list, or an object .*, got nothing"),
    ('{"visoin": {"bits": 4}}', "must be a list, or an object .*, got visoin"),
    ('[{"model_part": "VIT"}]', "layer_group: field required"),
    ('[{"model_part": "TEXT", "layer_group": "ALL", "layer_type": "MLP", "num_bits": 4}]', "model_part: .*got 'TEXT'"),
    (
        '[{"model_part": "VIT", "layer_group": "ALL", "layer_type": "MLP", "num_bits": 9}]',
        "bits must be an integer from 2 to 8, or 16, got 9",
    ),
    (
        '{"vision": {"bits": 4, "use_static_groups": true}}',
        "vision.use_static_groups must be false where use_act_order is, got true",
    ),
    (
        '{"vision": {"bits": 4}, "language": {"bits": 4, "percent_dampening": 0.1}}',
        "percent_dampening must be the same for all parts, got 0.01, 0.1",
    ),
    ('{"vit_layers": {"self_atn": 4}}', "vit_layers must have groups of .*, got 'self_atn'; did you mean self_attn"),
    ('{"vit_layers": 4}', "vit_layers must be an object of module groups, got 4"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_files_are_named_with_field_and_value(text, message, tmp_path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_study_config(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"configuration file .*none.json does not exist"):
        read_study_config(tmp_path / "none.json")


def test_a_group_that_the_model_lacks_may_be_left_alone() -> None:
    recipe, _ = study_recipe({"llm_layers": {"fc1": 16, "self_attn": 4}})
    assert [rule.bits for rule in recipe.rules] == [4]
