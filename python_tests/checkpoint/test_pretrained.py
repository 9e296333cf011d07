"""transformers' own from_pretrained and save_pretrained: packed folders, packing while loading, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_vlms
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import TINY, logits
from torch import nn

import mmq_kernels
from mmq_kernels import MMQConfig, QuantLinear, quantize_model
from mmq_kernels.checkpoint import CheckpointError
from mmq_kernels.demo import WEIGHTS, weights_folder
from mmq_kernels.demo.train import _use_old_names
from mmq_kernels.quantize import GptqSettings

RECIPE = "all=rtn:4:g32:asym"
BLIP2 = {f"blip2-{kind}": kind for kind in tiny_vlms.KINDS}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_vlms.make(BLIP2[name], dtype) if name in BLIP2 else TINY[name].make(dtype)


def run(name: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        if name in BLIP2:
            return tiny_vlms.outputs(model)
        return logits(model(**TINY[name].calls(1, dtype)[0]))


def assert_same(first: nn.Module, second: nn.Module) -> None:
    tensors, others = first.state_dict(), second.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def packed(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_shipped_miniatures_load_whole_on_both_lines(name: str) -> None:
    """transformers 4 once found no tower in LLaVA's, and made one up with a warning."""
    folder = weights_folder(name)
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    _, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_training_names_a_llavas_tower_as_the_hub_does(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for names, after in (
        (("vision_tower.a.weight", "language_model.b.weight"), "vision_tower.vision_model.a.weight"),
        (("vision_tower.vision_model.a.weight",), "vision_tower.vision_model.a.weight"),
        (("vision_model.a.weight",), "vision_model.a.weight"),
    ):
        save_file({name: torch.ones(2) for name in names}, file)
        _use_old_names(file)
        assert load_file(file).keys() == {after, *names[1:]}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A LLaVA that this package quantized and wrote: 4 and 8 bits by component, an ordered layer, input scales."""
    model = make("llava")
    recipe = "vision=rtn:8 connector=gptq:4:g16:sym language=awq:4:g16 re:.*q_proj=gptq:3:g16"
    quantize_model(model, recipe, TINY["llava"].calls(), settings=GptqSettings(order="activation"))
    return mmq_kernels.save(model, tmp_path / "llava", recipe=recipe)


@pytest.mark.parametrize("name", [*TINY, *BLIP2])
def test_packing_while_loading_is_rtn_and_comes_back(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "plain")
    loaded = type(model).from_pretrained(tmp_path / "plain", quantization_config=MMQConfig(RECIPE))
    quantize_model(model, RECIPE)
    assert_same(loaded, model)
    assert packed(loaded).keys() == packed(model).keys() != set()

    loaded.save_pretrained(tmp_path / "packed")
    back, info = type(model).from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(back, model)
    assert torch.equal(run(name, back), run(name, model))
    assert back.config.quantization_config.recipe == RECIPE
    assert_same(mmq_kernels.load(tmp_path / "packed"), model)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mllama"])
def test_scales_keep_their_dtype_in_a_model_of_another(name: str, tmp_path: Path) -> None:
    model = make(name)
    quantize_model(model, RECIPE)
    mmq_kernels.save(model, tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for path, layer in packed(loaded).items():
        expected = packed(model)[path].on_disk()
        assert layer.dtype == torch.bfloat16
        for own, tensor in layer.on_disk().items():
            assert tensor.dtype == expected[own].dtype
            assert torch.equal(tensor, expected[own])


def test_a_folder_of_ours_loads_with_every_method(llava: Path) -> None:
    ours = mmq_kernels.load(llava)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(llava)
    assert type(theirs) is type(ours)
    assert_same(theirs, ours)
    assert torch.equal(run("llava", theirs), run("llava", ours))
    assert any(layer.activation_order for layer in packed(theirs).values())


def test_shards(llava: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(llava)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert_same(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "shards"), model)
    assert_same(mmq_kernels.load(tmp_path / "shards"), model)


@pytest.mark.parametrize("name", ["llava", "llama", "paligemma"])
def test_a_part_of_the_model(name: str, tmp_path: Path) -> None:
    """`AutoModel` gives the model without its head; names lose their prefix."""
    if name != "llama" and transformers.__version__ < "5":
        pytest.skip("transformers 4 gives a part of such a model no weights, packed or not")
    whole = make(name)
    quantize_model(whole, RECIPE)
    mmq_kernels.save(whole, tmp_path / "packed")
    part = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    found = packed(part)
    assert {f"model.{name}" for name in found} == packed(whole).keys()
    for path, layer in found.items():
        assert torch.equal(layer.dequantize(), packed(whole)[f"model.{path}"].dequantize())


def test_a_loaded_model_is_written_by_transformers(llava: Path, tmp_path: Path) -> None:
    model = mmq_kernels.load(llava)
    model.save_pretrained(tmp_path / "again")
    assert_same(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "again"), model)


def test_a_model_quantized_in_memory_is_written_by_transformers(tmp_path: Path) -> None:
    model = make("llava")
    mmq_kernels.quantize_model(model, RECIPE)
    model.save_pretrained(tmp_path / "theirs")
    assert_same(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs"), model)
    mmq_kernels.save(model, tmp_path / "ours", recipe=RECIPE)
    assert_same(mmq_kernels.load(tmp_path / "ours"), model)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model.language_model": "cpu", "": "cpu"}])
def test_device_map(llava: Path, device_map: object) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto means the GPU here")
    model = transformers.AutoModelForImageTextToText.from_pretrained(llava, device_map=device_map)
    assert_same(model, mmq_kernels.load(llava))


def test_offloading_is_refused(llava: Path, tmp_path: Path) -> None:
    where = {"model.vision_tower": "disk", "": "cpu"}
    with pytest.raises(ValueError, match="device_map must not offload to 'disk'"):
        transformers.AutoModelForImageTextToText.from_pretrained(
            llava, device_map=where, offload_folder=tmp_path / "offloaded"
        )


def test_the_folder_decides_how_it_is_read(llava: Path) -> None:
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            llava, quantization_config=MMQConfig("all=rtn:2")
        )
    assert_same(model, mmq_kernels.load(llava))


def test_dense_again(llava: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(llava)
    expected = run("llava", model)
    model.dequantize()
    assert not packed(model) and not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(run("llava", model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["gptq", "gptq+", "awq"])
def test_calibration_is_for_others(method: str, tmp_path: Path) -> None:
    model = make("vit")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=f"{method.replace('+', '.')} needs calibration data.*mmq quantize"):
        type(model).from_pretrained(tmp_path / "plain", quantization_config=MMQConfig(f"all={method}:4"))


def test_a_config_without_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe must hold at least one rule"):
        MMQConfig()
    with pytest.raises(ValueError, match="recipe entries must look like"):
        MMQConfig("four bits")
    with pytest.raises(CheckpointError, match="format_version must be 1, got 7"):
        MMQConfig(format_version=7, groups=[])


def damage(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith(name))
    value = change(tensors.pop(key))
    save_file(tensors if value is None else tensors | {key: value}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("own", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "q_proj.bias"])
def test_a_missing_tensor_is_named(llava: Path, own: str) -> None:
    damage(llava, own, lambda tensor: None)
    with pytest.raises(CheckpointError, match=rf"lacks tensor .*{own}"):
        transformers.AutoModelForImageTextToText.from_pretrained(llava)


@pytest.mark.parametrize(
    ("own", "change", "message"),
    [
        ("weight_scale", lambda t: t * float("nan"), "weight_scale must be finite"),
        ("weight_packed", lambda t: t[:, 1:].contiguous(), "weight_packed must have shape"),
        ("weight_shape", lambda t: t + 1, "weight_shape must be"),
        ("weight_g_idx", lambda t: t + 100, "weight_g_idx must"),
    ],
)
def test_a_malformed_tensor_is_named(llava: Path, own: str, change, message: str) -> None:
    damage(llava, own, change)
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForImageTextToText.from_pretrained(llava)


def test_a_model_without_any_listed_layer(llava: Path) -> None:
    path = llava / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["checksum"]
    for group in config["quantization_config"]["groups"]:
        group["layers"] = [f"other.{name}" for name in group["layers"]]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has none of the layers that quantization_config lists, such as other"):
        transformers.AutoModelForImageTextToText.from_pretrained(llava)


IMPORTS = {
    "first": "import mmq_kernels, transformers",
    "last": "import transformers, mmq_kernels",
    "in the middle": "from transformers import AutoModel; import transformers, mmq_kernels",
    "twice": "import importlib, mmq_kernels, transformers; importlib.reload(mmq_kernels)",
    "never": "import transformers",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_imported(order: str, tmp_path: Path) -> None:
    """Whenever it is imported, transformers knows; where it is not, transformers says so and goes on."""
    model = make("vit")
    quantize_model(model, RECIPE)
    mmq_kernels.save(model, tmp_path / "packed")
    code = (
        f"{IMPORTS[order]}\n"
        f"model = transformers.AutoModelForImageClassification.from_pretrained({str(tmp_path / 'packed')!r})\n"
        "print('packed', sum(type(module).__name__ == 'QuantLinear' for module in model.modules()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"packed {0 if order == 'never' else len(packed(model))}" in done.stdout
    assert ("Unknown quantization type, got mmq" in done.stderr) == (order == "never")


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, mmq_kernels; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"], done.stderr
