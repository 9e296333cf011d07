"""Calibrated methods from folder to folder: block by block, and bit for bit what the whole model in memory gives."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import huggingface_hub
import pytest
import tiny_vlms
import torch
from safetensors.torch import load_file, save_file
from tiny_families import TINY
from torch import nn

from mmq_kernels import QuantLinear, quantize_checkpoint, quantize_model, save
from mmq_kernels.checkpoint import CheckpointError, quantization
from mmq_kernels.checkpoint.streamed import Streamed, Unfit
from mmq_kernels.quantize import GptqSettings

BLIP2 = {f"blip2-{kind}": kind for kind in tiny_vlms.KINDS}
RECIPES = {"gptq": "all=gptq:4:g16", "awq": "all=awq:3:g16"}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_vlms.make(BLIP2[name], dtype) if name in BLIP2 else TINY[name].make(dtype)


class Data:
    """The calibration batches of a tiny model."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fingerprint(self) -> str:
        return "always the same"

    def batches(self, model: nn.Module, processor: object) -> list:
        return tiny_vlms.batches(model) if self.name in BLIP2 else TINY[self.name].calls()


@pytest.fixture(autouse=True)
def no_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "load_processor", lambda source: None)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


FOLDED = ("llava", "pixtral", "qwen3_vl", "mllama", "instructblip", "clip", "blip2-itm")
"""Families whose awq is compared too: each folds its scales in a way of its own."""


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "gptq") for name in (*TINY, *BLIP2)), *((name, "awq") for name in FOLDED)]
)
def test_the_same_bits_as_in_memory(name: str, method: str, tmp_path: Path) -> None:
    save(make(name), tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", RECIPES[method], tmp_path / "streamed", calibration=Data(name))
    model = make(name)
    report = quantize_model(model, RECIPES[method], Data(name).batches(model, None))
    save(model, tmp_path / "whole", recipe=report.recipe)
    assert digests(tmp_path / "streamed") == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["llava", "mllama", "qwen2_vl"])
def test_names_that_transformers_gives_to_files(name: str, tmp_path: Path) -> None:
    """`save_pretrained` writes hub names, which are not always those of the model."""
    model = make(name)
    model.save_pretrained(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    for recipe in ("all=rtn:4:g16", "all=gptq:4:g16"):
        digest = []
        for source in ("theirs", "ours"):
            out = tmp_path / f"{source}-{recipe[4:7]}"
            quantize_checkpoint(tmp_path / source, recipe, out, calibration=Data(name))
            digest.append(load_file(out / "model.safetensors"))
        assert digest[0].keys() == digest[1].keys()
        assert all(torch.equal(tensor, digest[1][key]) for key, tensor in digest[0].items())


@pytest.mark.parametrize("name", [*TINY, *BLIP2])
def test_half_precision_is_kept(name: str, tmp_path: Path) -> None:
    """On the CPU a model in fp16 is computed in fp32, block by block; what is left alone comes out as it went in."""
    save(make(name, torch.float16), tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", "all=gptq:4:g16", tmp_path / "out", calibration=Data(name))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    kept = before.keys() & after.keys()
    assert kept and all(after[name].dtype == torch.float16 for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read, no more than one block's tensors are in memory besides those outside blocks."""
    save(make("llava"), tmp_path / "source")
    most: list[int] = []
    entered: list[str] = []
    enter = Streamed._enter

    def watched(self: Streamed, block: str) -> None:
        enter(self, block)
        entered.append(block)
        there = {
            name
            for name in self._blocks
            for tensor in self.model.get_submodule(name).parameters()
            if tensor.device.type != "meta"
        }
        most.append(len(there))

    monkeypatch.setattr(Streamed, "_enter", watched)
    quantize_checkpoint(tmp_path / "source", RECIPES["awq"], tmp_path / "out", calibration=Data("llava"))
    assert max(most) == 1
    assert len({block for block in entered if ".layers." in block}) > 4


def test_tied_heads(tmp_path: Path) -> None:
    """A head that is quantized away from its embedding, which keeps its own."""
    save(make("blip2-opt"), tmp_path / "source")
    recipe = "language=gptq:4:g16 *lm_head=gptq:8:g16"
    report = quantize_checkpoint(tmp_path / "source", recipe, tmp_path / "out", calibration=Data("blip2-opt"))
    model = make("blip2-opt")
    quantize_model(model, recipe, tiny_vlms.batches(model))
    save(model, tmp_path / "whole", recipe=report["recipe"])
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_options_reach_it(tmp_path: Path) -> None:
    save(make("vit"), tmp_path / "source")
    settings = GptqSettings(order="activation")
    quantize_checkpoint(
        tmp_path / "source", "all=gptq:4:g16", tmp_path / "out", calibration=Data("vit"), settings=settings
    )
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("weight_g_idx") for name in names)


def test_what_does_not_fit_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot be streamed goes the other way, with the same result."""
    save(make("vit"), tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", "all=gptq:4:g16", tmp_path / "streamed", calibration=Data("vit"))

    def unfit(self: Streamed, *arguments: object) -> None:
        raise Unfit("for a test")

    monkeypatch.setattr(Streamed, "__init__", unfit)
    quantize_checkpoint(tmp_path / "source", "all=gptq:4:g16", tmp_path / "loaded", calibration=Data("vit"))
    assert digests(tmp_path / "streamed") == digests(tmp_path / "loaded")


def test_damage_is_named(tmp_path: Path) -> None:
    save(make("vit"), tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".layer" in name and tensors[name].dim() == 2)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks tensor {name}"):
        quantize_checkpoint(tmp_path / "source", "all=gptq:4:g16", tmp_path / "out", calibration=Data("vit"))
    save_file(tensors | {name: tensors[name][1:].contiguous()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {name} must have shape"):
        quantize_checkpoint(tmp_path / "source", "all=gptq:4:g16", tmp_path / "out", calibration=Data("vit"))
    assert not (tmp_path / "out").exists()


def test_quantized_sources_are_refused(tmp_path: Path) -> None:
    model = make("vit")
    quantize_model(model, "all=rtn:4")
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    save(model, tmp_path / "source")
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "source", "all=gptq:4:g16", tmp_path / "out", calibration=Data("vit"))


def test_a_name_of_the_hub_streams_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "cache" / "models--owner--llava"
    snapshot = cached / "snapshots" / "0123abc"
    save(make("llava"), snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(quantization, "load", None)  # not the whole model
    for recipe in ("all=rtn:4:g16", RECIPES["gptq"]):
        for source, out in ((snapshot, "folder"), ("owner/llava", "hub")):
            quantize_checkpoint(source, recipe, tmp_path / recipe[4:7] / out, calibration=Data("llava"))
        assert digests(tmp_path / recipe[4:7] / "folder") == digests(tmp_path / recipe[4:7] / "hub")
    with pytest.raises(CheckpointError, match="owner/other is no folder here, nor to be had"):
        quantize_checkpoint("owner/other", "all=rtn:4:g16", tmp_path / "other")
