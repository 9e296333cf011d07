"""Weights that public packers packed (fixtures/README.md says how) import exactly, and export back bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_cases import codes_of, edit_config, edit_tensors, tensors_of
from safetensors import safe_open
from tiny_vlms import make
from torch import Tensor

from mmq_kernels.checkpoint import CheckpointError, export_folder, import_folder, load, save

FIXTURES = Path(__file__).parent / "fixtures"
LAYER = "language_model.model.decoder.layers.0.fc2"
"""[32, 64]."""


def cases() -> list[Any]:
    found = []
    for path in sorted(FIXTURES.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name, settings in sorted(file.metadata().items()):
                found.append(pytest.param(path, name, json.loads(settings), id=f"{path.stem}-{name}"))
    return found


def known(bits: int, group: int, symmetric: bool, order: bool, lowest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes ``[32, 64]``, scales and zero points ``[32, groups]``, group of each column ``[64]``."""
    n, k = 32, 64
    i, j = torch.arange(n).view(-1, 1), torch.arange(k)
    length = k if group == -1 else group
    g = torch.arange(k // length)
    codes = (7 * i + 3 * j + i * j % 5) % 2**bits
    scale = (2.0 ** -(4 + (i + g) % 3)).half()
    zero = torch.full((n, len(g)), 2 ** (bits - 1)) if symmetric else lowest + (i + 2 * g) % (2**bits - lowest)
    return codes, scale, zero, (j * 29 % k if order else j) // length


def settings_for(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of a model with this one layer."""
    if path.stem.startswith("autoawq"):
        return {"quant_method": "awq", **said}
    if not path.stem.startswith("compressed"):
        return {"quant_method": "gptq", **said}
    group = said["group_size"]
    weights = {"num_bits": said["bits"], "type": "int", "symmetric": said["sym"], "actorder": said["actorder"]}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "version": path.stem.rpartition("-")[2],
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("opt"), tmp_path_factory.mktemp("plain") / "plain")


@pytest.mark.parametrize(("path", "name", "said"), cases())
def test_a_public_packers_file(path: Path, name: str, said: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    settings = settings_for(path, said)
    source = Path(shutil.copytree(plain, tmp_path / "a"))
    edit_config(source, lambda content: content.update(quantization_config=settings))

    def store(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{LAYER}.weight"]
        with safe_open(path, "pt") as file:
            own = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
            tensors |= {key.replace(name, LAYER, 1): file.get_tensor(key) for key in own}

    edit_tensors(source, store)
    import_folder(source, tmp_path / "b")

    bits, symmetric, order = said["bits"], said.get("sym", False), bool(said.get("desc_act") or said.get("actorder"))
    lowest = said.get("lowest", 0)
    codes, scale, zero, g_idx = known(bits, said["group_size"], symmetric, order, lowest)
    tensors, layer = tensors_of(tmp_path / "b"), load(tmp_path / "b").get_submodule(LAYER)
    assert torch.equal(codes_of(tensors[f"{LAYER}.weight_packed"], bits, 64), codes)
    assert torch.equal(tensors[f"{LAYER}.weight_scale"], scale)
    assert (layer.spec.symmetric, layer.activation_order) == (symmetric, order)
    if not symmetric:
        assert torch.equal(codes_of(tensors[f"{LAYER}.weight_zero_point"].t(), bits, 32).t(), zero)
    if order:
        assert torch.equal(tensors[f"{LAYER}.weight_g_idx"], g_idx.int())
    assert torch.equal(layer.dequantize(), scale.float()[:, g_idx] * (codes - zero[:, g_idx]))

    format = said.get("checkpoint_format", settings["quant_method"])
    if format == "gptq" and lowest == 0:  # GPTQModel reads what it made of zero points below 0, others do not
        with pytest.raises(CheckpointError, match=r"zero points of 0.*gptq_v2"):
            export_folder(tmp_path / "b", tmp_path / "c", format)
    elif format != "compressed-tensors":  # which no longer writes what these files hold
        export_folder(tmp_path / "b", tmp_path / "c", format)
        written, before = tensors_of(tmp_path / "c"), tensors_of(source)
        assert written.keys() == before.keys()
        for key, tensor in before.items():
            assert torch.equal(written[key], tensor) and written[key].dtype == tensor.dtype, key


def test_every_packer_is_there() -> None:
    assert {path.stem.partition("-")[0] for path in FIXTURES.glob("*.safetensors")} == {
        "autoawq",
        "auto_round",
        "compressed_tensors",
        "gptqmodel",
    }
