"""Save and load: the same model comes back, whatever was quantized in it."""

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_vlms import KINDS, assert_same_outputs, make
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from mmq_kernels import QuantLinear, QuantSpec
from mmq_kernels.checkpoint import CheckpointError, disk_bytes, load, load_processor, save
from mmq_kernels.models import quantize_model
from mmq_kernels.nn import set_activation_bits

RECIPE = "vision=rtn:4:g16 connector=rtn:8 all/mlp=uniform:3"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make(kind, dtype)
    quantize_model(model, RECIPE)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_comes_back_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(kind, dtype)
    save(model, tmp_path / "q", recipe=RECIPE)
    back = load(tmp_path / "q")
    assert type(back) is type(model)
    assert not back.training
    assert_same_outputs(back, model)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, layer in packed.items():
        other = back.get_submodule(name)
        assert isinstance(other, QuantLinear)
        assert (other.spec, other.dtype, other.scale_runtime.dtype) == (
            layer.spec,
            layer.dtype,
            layer.scale_runtime.dtype,
        )
    theirs = back.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_on_meta_and_computed_buffers_are_right(kind: str, tmp_path: Path) -> None:
    model = quantized(kind)
    save(model, tmp_path / "q")
    back = load(tmp_path / "q")
    tensors = [*back.named_parameters(), *back.named_buffers()]
    assert [name for name, tensor in tensors if tensor.device.type == "meta"] == []
    theirs = dict(back.named_buffers())
    ours = {n: b for n, b in model.named_buffers() if "_runtime" not in n}
    assert ours
    for name, buffer in ours.items():
        assert torch.equal(theirs[name], buffer), name


def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path) -> None:
    model = quantized("opt")
    save(model, tmp_path / "q")
    names = [name for name in stored(tmp_path / "q") if "lm_head" in name or "embed_tokens" in name]
    assert names == ["language_model.model.decoder.embed_tokens.weight"]
    back = load(tmp_path / "q")
    assert back.language_model.lm_head.weight is back.language_model.model.decoder.embed_tokens.weight


def test_a_quantized_head_is_no_longer_tied(tmp_path: Path) -> None:
    model = make("opt")
    quantize_model(model, "language_model.lm_head=rtn:8:g16")
    save(model, tmp_path / "q")
    back = load(tmp_path / "q")
    assert isinstance(back.language_model.lm_head, QuantLinear)
    assert_same_outputs(back, model)


def test_tied_weights_that_differ_stay_apart(tmp_path: Path) -> None:
    model = quantized("opt")
    head = model.language_model.lm_head
    head.weight = nn.Parameter(head.weight.detach() * 2)
    save(model, tmp_path / "q")
    assert_same_outputs(load(tmp_path / "q"), model)


def test_parameters_that_share_memory_are_both_written(tmp_path: Path) -> None:
    model = quantized("t5")
    blocks = model.language_model.encoder.block
    first = blocks[0].layer[0].layer_norm
    first.weight = nn.Parameter(blocks[1].layer[0].layer_norm.weight.detach())
    save(model, tmp_path / "q")
    assert_same_outputs(load(tmp_path / "q"), model)


def test_shards_have_transformers_names_and_an_index(tmp_path: Path) -> None:
    model = quantized("opt")
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", max_shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    whole, parts = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert whole.keys() == parts.keys()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    assert_same_outputs(load(tmp_path / "many"), model)


def test_config_says_what_each_layer_is(tmp_path: Path) -> None:
    model = quantized("opt")
    save(model, tmp_path / "q", recipe=RECIPE)
    described = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["format_version"]) == ("mmq", 1)
    assert described["recipe"] == RECIPE
    listed = [name for group in described["groups"] for name in group["layers"]]
    assert sorted(listed) == sorted(n for n, m in model.named_modules() if isinstance(m, QuantLinear))
    specs = {(g["bits"], g["group_size"], g["symmetric"], g["dtype"]) for g in described["groups"]}
    assert specs == {(4, 16, False, "float32"), (8, -1, False, "float32"), (3, -1, False, "float32")}
    assert load(tmp_path / "q").config.quantization_config["recipe"] == RECIPE


def test_saving_again_what_was_loaded_gives_the_same_files(tmp_path: Path) -> None:
    save(quantized("opt"), tmp_path / "a", recipe=RECIPE)
    save(load(tmp_path / "a"), tmp_path / "b", recipe=RECIPE)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_activation_order_and_input_scale_come_back(tmp_path: Path) -> None:
    model = make("opt")
    spec = QuantSpec(4, 8)
    n, k = 32, 32
    block = model.vision_model.encoder.layers[0].self_attn
    block.projection = QuantLinear.from_codes(
        torch.randint(0, 16, (n, k), dtype=torch.uint8),
        torch.rand(n, 4).half() * 0.02,
        torch.full((n, 4), 7, dtype=torch.uint8),
        spec,
        bias=block.projection.bias.detach(),
        g_idx=(torch.randperm(k) // 8).int(),
        input_scale=torch.rand(k) + 0.5,
    )
    save(model, tmp_path / "q")
    assert_same_outputs(load(tmp_path / "q"), model)


def test_dtype_changes_floats_and_leaves_codes_alone(tmp_path: Path) -> None:
    save(quantized("t5"), tmp_path / "q")
    as_stored, asked = load(tmp_path / "q"), load(tmp_path / "q", dtype=torch.bfloat16)
    assert {p.dtype for p in asked.parameters()} == {torch.bfloat16}
    for name, module in asked.named_modules():
        if isinstance(module, QuantLinear):
            assert module.dtype == torch.bfloat16
            assert torch.equal(module.dequantize(), as_stored.get_submodule(name).dequantize())


def test_half_precision_becomes_single_on_the_cpu_unless_asked(tmp_path: Path) -> None:
    for folder, model in (("plain", make("opt", torch.float16)), ("q", quantized("opt", torch.float16))):
        save(model, tmp_path / folder)
        assert {p.dtype for p in load(tmp_path / folder).parameters()} == {torch.float32}
        half = load(tmp_path / folder, dtype=torch.float16)
        assert half.vision_model.embeddings.class_embedding.dtype == torch.float16
        assert load(tmp_path / folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_an_unquantized_model_is_a_plain_transformers_folder(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert stored(tmp_path / "ours").keys() == stored(tmp_path / "theirs").keys()
    for folder in ("ours", "theirs"):
        assert_same_outputs(load(tmp_path / folder), model)
        assert_same_outputs(type(model).from_pretrained(tmp_path / folder), model)


def test_generation_config_and_processor_travel_along(tmp_path: Path) -> None:
    model = quantized("opt")
    model.generation_config.num_beams = 3
    words = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    save(model, tmp_path / "a", processor=tokenizer)
    save(model, tmp_path / "b", source=tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert load(folder).generation_config.num_beams == 3
        assert PreTrainedTokenizerFast.from_pretrained(folder).convert_tokens_to_ids("cat") == 1
    assert disk_bytes(tmp_path / "a") == sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
    save(model, tmp_path / "c")
    with pytest.raises(CheckpointError, match="has no usable processor"):
        load_processor(tmp_path / "c")


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    save(quantized("opt"), tmp_path / "q")
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "q").iterdir()} == {expected}


def test_rounded_activations_are_kept_and_asked_for(tmp_path: Path) -> None:
    model = quantized("opt" if "opt" in KINDS else KINDS[0])
    save(model, tmp_path / "plain")
    assert "activation_bits" not in (tmp_path / "plain" / "config.json").read_text()
    set_activation_bits(model, 8)
    save(model, tmp_path / "rounded")
    for back in (load(tmp_path / "rounded"), load(tmp_path / "plain", activation_bits=8)):
        assert {m.activation_bits for m in back.modules() if isinstance(m, QuantLinear)} == {8}
        assert_same_outputs(back, model)
    back = load(tmp_path / "rounded", activation_bits=16)
    assert {m.activation_bits for m in back.modules() if isinstance(m, QuantLinear)} == {16}
    with pytest.raises(ValueError, match="activation_bits must be 16 or 8, got 3"):
        load(tmp_path / "plain", activation_bits=3)
