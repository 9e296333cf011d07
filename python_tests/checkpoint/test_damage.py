"""Folders that are no model, damaged files, full disks: one line that names the thing, nothing left behind."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_vlms import make
from torch import nn

from mmq_kernels import QuantLinear
from mmq_kernels.checkpoint import CheckpointError, check_target, load, save
from mmq_kernels.models import quantize_model

PACKED = "vision_model.encoder.layers.0.mlp.fc1"
FLOAT = "language_model.model.decoder.layers.0.fc1"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quantized model in one file ("one") and in shards ("many"), and one that is not quantized ("plain")."""
    folder = tmp_path_factory.mktemp("written")
    model = make("opt")
    save(model, folder / "plain")
    quantize_model(model, "vision=rtn:4:g16")
    save(model, folder / "one")
    save(model, folder / "many", max_shard_bytes=30_000)
    return folder


@pytest.fixture
def one(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "one", tmp_path / "one"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    if isinstance(content.get("quantization_config"), dict):
        content["quantization_config"].pop("checksum", None)  # what is changed on purpose is not held against it
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def refused(folder: str | Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- tensors --------------------------------------------------------------------------------------------------------


def test_a_truncated_file_names_the_tensor(one: Path) -> None:
    file = one / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    last = max(load_header(one).items(), key=lambda item: item[1]["data_offsets"][1])[0]
    refused(one, "model.safetensors is truncated in tensor", last)


def load_header(folder: Path) -> dict[str, Any]:
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    return header


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_file_cut_inside_its_header_is_refused(one: Path, kept: int) -> None:
    file = one / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(one, "is no complete safetensors file")


def test_a_header_of_garbage_is_refused(one: Path) -> None:
    (one / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"{" * 40)
    refused(one, "damaged safetensors header")


def test_a_header_whose_sizes_contradict_is_refused(one: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (one / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(one, "tensor a the wrong number of bytes")


@pytest.mark.parametrize("plain", [False, True])
def test_truncation_is_seen_in_unquantized_folders_too(plain: bool, written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / ("plain" if plain else "many"), tmp_path / "copy"))
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, file.name, "is truncated in tensor")


def test_a_missing_shard_is_named(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "many", tmp_path / "copy"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, shard.name, "is missing")


def test_an_index_that_names_another_tensor_is_refused(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "many", tmp_path / "copy"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    refused(folder, "has no tensor ghost")
    content["weight_map"]["ghost"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    refused(folder, "is no index of safetensors files")


@pytest.mark.parametrize("name", [f"{PACKED}.weight_scale", f"{PACKED}.bias", f"{FLOAT}.weight", "query_tokens"])
def test_a_missing_tensor_is_named(one: Path, name: str) -> None:
    edit_tensors(one, lambda tensors: tensors.pop(name))
    refused(one, "lacks tensor", name)


def test_a_missing_tensor_of_an_unquantized_folder_is_named(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "plain", tmp_path / "copy"))
    edit_tensors(folder, lambda tensors: tensors.pop(f"{FLOAT}.weight"))
    refused(folder, "lacks tensor", f"{FLOAT}.weight")


def test_an_unknown_tensor_is_named(one: Path) -> None:
    edit_tensors(one, lambda tensors: tensors.update(ghost=torch.zeros(2)))
    refused(one, "model.safetensors holds tensor ghost, which the model has no place for")


def test_a_table_of_positions_from_an_older_writer_is_ignored(one: Path) -> None:
    edit_tensors(one, lambda tensors: tensors.update({"qformer.position_ids": torch.arange(4)}))
    assert isinstance(load(one).get_submodule(PACKED), QuantLinear)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (f"{FLOAT}.weight", torch.zeros(3, 4), "must have shape [64, 32], got [3, 4]"),
        (f"{PACKED}.bias", torch.zeros(3), "must have shape [48], got [3]"),
        (f"{PACKED}.weight_shape", torch.tensor([4, 4]), "must be [48, 32], got [4, 4]"),
        (f"{PACKED}.weight_packed", torch.zeros(48, 3, dtype=torch.int32), "must have shape [48, 4]"),
        (f"{PACKED}.weight_packed", torch.zeros(48, 4), "weight_packed must be torch.int32"),
        (f"{PACKED}.weight_scale", torch.full((48, 2), torch.nan), "weight_scale must be finite"),
    ],
)
def test_a_malformed_tensor_is_named(one: Path, name: str, tensor: torch.Tensor, said: str) -> None:
    edit_tensors(one, lambda tensors: tensors.update({name: tensor}))
    refused(one, "model.safetensors", name.rpartition(".")[0], said)


# --- config ---------------------------------------------------------------------------------------------------------


def described(content: dict[str, Any]) -> dict[str, Any]:
    return content["quantization_config"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q.update(format_version=2), "format_version must be 1, got 2"),
        (lambda q: q.update(quant_method="awq"), "quant_method must be 'mmq', got 'awq'"),
        (lambda q: q["groups"][0].update(bits=9), "bits must be an integer from 2 to 8, got 9"),
        (lambda q: q["groups"][0].update(bits="4"), "groups.0.bits"),
        (lambda q: q["groups"][0].update(group_size=12), "group_size must be -1 or a positive multiple of 8, got 12"),
        (lambda q: q["groups"][0].update(flavour=1), "groups.0.flavour"),
        (lambda q: q["groups"][0]["layers"].append(PACKED), "must be in one group"),
        (lambda q: q["groups"][0]["layers"].append("ghost.layer"), "names layer ghost.layer, which the model lacks"),
        (lambda q: q["groups"][0]["layers"].append("vision_model"), "vision_model, which is no linear"),
        (lambda q: q["groups"][0]["layers"].remove(PACKED), "holds tensor"),
        (lambda q: q.pop("groups"), "groups"),
    ],
)
def test_a_malformed_description_is_named(one: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    edit_config(one, lambda content: change(described(content)))
    refused(one, said)


def test_configs_that_describe_no_model(one: Path) -> None:
    edit_config(one, lambda content: content.update(quantization_config="mmq"))
    refused(one, "quantization_config must be an object")
    edit_config(one, lambda content: content.update(quantization_config={}, architectures=["Ghost"]))
    refused(one, "quant_method")
    for architectures in (["GhostForTesting"], ["AutoConfig"], None):
        edit_config(
            one,
            lambda content, a=architectures: (content.pop("quantization_config", 0), content.update(architectures=a)),
        )
        refused(one, "architectures must name a model class")
    (one / "config.json").write_text("[1]")
    refused(one, "must hold an object")
    (one / "config.json").write_text("{")
    refused(one, "is no valid JSON")
    (one / "config.json").unlink()
    refused(one, "is no model", "config.json")


def test_a_place_that_holds_no_model(written: Path, tmp_path: Path) -> None:
    refused(tmp_path, "is no model: it has no config.json")
    refused(tmp_path / "absent", "does not exist")
    refused("./absent", "does not exist")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")
    shutil.copy(written / "plain" / "config.json", tmp_path)
    refused(tmp_path, "holds no model.safetensors")


def test_pickles_are_never_opened(written: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(written / "plain" / "config.json", folder)
    torch.save(Trap(), folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "never opened", "save_pretrained")
    assert not (tmp_path / "sprung").exists()


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing_behind(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = safetensors.torch.save_file, []

    def full(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        real(*arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match=r"could not be written: .*free some space") as caught:
        save(make("opt"), tmp_path / "deep" / "out", max_shard_bytes=10_000)
    assert str(tmp_path / "deep" / "out") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(calls) == 3
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(make("opt"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_are_taken_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").touch()
    for name, said in (("full", "is not empty"), ("file", "is a file"), ("file/below", "no writable folder")):
        with pytest.raises(CheckpointError, match=said):
            check_target(tmp_path / name)
        with pytest.raises(CheckpointError, match=said):
            save(nn.Identity(), tmp_path / name)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    save(make("opt"), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_fused_activation_cannot_be_saved(one: Path, tmp_path: Path) -> None:
    model = load(one)
    model.get_submodule(PACKED).activation = "gelu"
    with pytest.raises(CheckpointError, match=r"activation must be 'none'.*got 'gelu'"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
