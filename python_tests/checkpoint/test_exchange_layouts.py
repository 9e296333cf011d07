"""Files of the published layouts, built here code by code, import exactly and export back bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_cases import (
    assert_same_tensors,
    codes_of,
    edit_config,
    edit_tensors,
    naive_stream,
    settings_of,
    signed,
    tensors_of,
)
from tiny_families import TINY
from tiny_vlms import make
from torch import Tensor

from mmq_kernels import QuantLinear
from mmq_kernels.checkpoint import export_folder, import_folder, load, save

LAYERS = ("language_model.model.decoder.layers.0.fc2", "language_model.model.decoder.layers.1.self_attn.k_proj")
"""[32, 64] and [32, 32]."""

Case = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("opt"), tmp_path_factory.mktemp("plain") / "plain")


def weight(n: int, k: int, bits: int, group: int, order: bool, lowest: int = 0, symmetric: bool = False) -> Case:
    """A random weight, as integers and fp16 scales."""
    length = k if group == -1 else group
    groups = -(-k // length)
    codes = torch.randint(0, 2**bits, (n, k))
    codes[0], codes[1] = 0, 2**bits - 1
    zero = torch.randint(lowest, 2**bits, (n, groups))
    zero[0], zero[1] = lowest, 2**bits - 1
    if symmetric:
        zero[:] = 2 ** (bits - 1)
    g_idx = (torch.randperm(k) if order else torch.arange(k)) // length
    return {
        "codes": codes,
        "zero": zero,
        "scale": (torch.rand(n, groups) * 0.02 + 1e-4).half(),
        "g_idx": g_idx.int(),
        "bits": bits,
    }


def foreign(plain: Path, folder: Path, pack: Callable[[Case], dict[str, Tensor]], cases: list[Case], **settings: Any):
    """The plain model with LAYERS stored by `pack`."""
    shutil.copytree(plain, folder)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, case in zip(LAYERS, cases, strict=True):
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{own}": tensor.contiguous() for own, tensor in pack(case).items()}

    edit_tensors(folder, change)
    edit_config(folder, lambda content: content.update(quantization_config=settings))
    return folder


def assert_imported(folder: Path, cases: list[Case]) -> None:
    """Codes, scales, zero points and the columns' groups are those of the cases, and the layer means the same."""
    tensors, model = tensors_of(folder), load(folder)
    for name, case in zip(LAYERS, cases, strict=True):
        n, k = case["codes"].shape
        bits, layer = case["bits"], model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert torch.equal(codes_of(tensors[f"{name}.weight_packed"], bits, k), case["codes"])
        assert torch.equal(tensors[f"{name}.weight_scale"], case["scale"])
        assert layer.spec.symmetric == (f"{name}.weight_zero_point" not in tensors)
        if not layer.spec.symmetric:
            zero = codes_of(tensors[f"{name}.weight_zero_point"].t(), bits, n).t()
            assert torch.equal(zero, case["zero"])
        assert layer.activation_order == (not torch.equal(case["g_idx"], case["g_idx"].sort().values))
        column = case["g_idx"].long()
        dense = case["scale"].double()[:, column] * (case["codes"] - case["zero"][:, column])
        assert torch.equal(layer.dequantize(torch.float32), dense.float())


# --- GPTQ -----------------------------------------------------------------------------------------------------------


def gptq_words(column: list[int], bits: int) -> list[int]:
    """Words of one column of codes; 3 bits as AutoGPTQ writes them: 10 codes, a split one, 10, a split one, 10."""
    if bits != 3:
        per_word = 32 // bits
        parts = [column[i : i + per_word] for i in range(0, len(column), per_word)]
        return [signed(sum(code << (bits * j) for j, code in enumerate(part))) for part in parts]
    words = []
    for start in range(0, len(column), 32):
        v = column[start : start + 32]
        a = sum(v[i] << (3 * i) for i in range(10)) | (v[10] & 3) << 30
        b = v[10] >> 2 | sum(v[11 + i] << (3 * i + 1) for i in range(10)) | (v[21] & 1) << 31
        c = v[21] >> 1 | sum(v[22 + i] << (3 * i + 2) for i in range(10))
        words += [signed(a), signed(b), signed(c)]
    return words


def gptq(subtracted: int) -> Callable[[Case], dict[str, Tensor]]:
    def pack(case: Case) -> dict[str, Tensor]:
        bits = case["bits"]
        qzeros = [gptq_words(row, bits) for row in (case["zero"] - subtracted).t().tolist()]
        qweight = [gptq_words(column, bits) for column in case["codes"].tolist()]
        return {
            "qweight": torch.tensor(qweight, dtype=torch.int32).t(),
            "qzeros": torch.tensor(qzeros, dtype=torch.int32),
            "scales": case["scale"].t(),
            "g_idx": case["g_idx"],
        }

    return pack


@pytest.mark.parametrize("order", [False, True], ids=["plain", "order"])
@pytest.mark.parametrize("group", [16, 24, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(version: str, bits: int, group: int, order: bool, plain: Path, tmp_path: Path) -> None:
    subtracted = 1 if version == "gptq" else 0
    cases = [weight(32, k, bits, group, order, lowest=subtracted, symmetric=k == 32) for k in (64, 32)]
    settings = {"quant_method": "gptq", "checkpoint_format": version, "bits": bits, "group_size": group}
    dynamic = {f"+:{LAYERS[1]}": {"sym": True}, "-:lm_head": {}}
    source = foreign(
        plain, tmp_path / "a", gptq(subtracted), cases, **settings, sym=False, desc_act=order, dynamic=dynamic
    )
    import_folder(source, tmp_path / "b")
    assert_imported(tmp_path / "b", cases)
    assert load(tmp_path / "b").get_submodule(LAYERS[1]).spec.symmetric
    export_folder(tmp_path / "b", tmp_path / "c", version)
    assert_same_tensors(source, tmp_path / "c")
    written = settings_of(tmp_path / "c")
    assert {key: written[key] for key in settings} == settings


def test_gptq_of_older_writers(plain: Path, tmp_path: Path) -> None:
    """Settings in quantize_config.json alone, no g_idx, no version."""
    cases = [weight(32, k, 4, 16, False, lowest=1, symmetric=True) for k in (64, 32)]
    source = foreign(plain, tmp_path / "a", gptq(1), cases)
    edit_config(source, lambda content: content.pop("quantization_config"))
    (source / "quantize_config.json").write_text('{"bits": 4, "group_size": 16, "desc_act": false}')
    edit_tensors(source, lambda tensors: [tensors.pop(f"{name}.g_idx") for name in LAYERS])
    import_folder(source, tmp_path / "b")
    assert_imported(tmp_path / "b", cases)


def test_symmetric_by_its_settings_alone_is_stored_as_it_is(plain: Path, tmp_path: Path) -> None:
    cases = [weight(32, k, 4, 16, False, lowest=1) for k in (64, 32)]
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}
    import_folder(foreign(plain, tmp_path / "a", gptq(1), cases, **settings), tmp_path / "b")
    assert_imported(tmp_path / "b", cases)


def test_version_1_takes_one_from_a_whole_word(plain: Path, tmp_path: Path) -> None:
    """Where a zero point is 0, that borrows from the field above it."""
    cases = [weight(32, k, 4, 16, False) for k in (64, 32)]
    for case in cases:
        case["zero"][::3] = 0

    def pack(case: Case) -> dict[str, Tensor]:
        return {**gptq(0)(case), "qzeros": gptq(0)(case)["qzeros"] - 0x11111111}

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
    import_folder(foreign(plain, tmp_path / "a", pack, cases, **settings), tmp_path / "b")
    assert_imported(tmp_path / "b", cases)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_folders_with_the_names_of_a_first_release(family: str, tmp_path: Path) -> None:
    """`save_pretrained` writes those names; `load` wants the class's."""
    model = TINY[family].make()
    model.save_pretrained(tmp_path / "a")
    disk = tensors_of(tmp_path / "a")
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    cases = {}
    for name, tensor in disk.items():
        owner = next((own for own, known in weights.items() if torch.equal(known, tensor)), None)
        if owner is not None and owner.endswith(("q_proj", "fc1", "down_proj")):
            cases[name.removesuffix(".weight")] = (owner, weight(*tensor.shape, 4, 8, False))
    assert any(old != new for old, (new, _) in cases.items()) and len(cases) >= 6

    def change(tensors: dict[str, Tensor]) -> None:
        for old, (_, case) in cases.items():
            del tensors[f"{old}.weight"]
            tensors |= {f"{old}.{own}": tensor.contiguous() for own, tensor in gptq(0)(case).items()}

    edit_tensors(tmp_path / "a", change)
    settings = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 8, "sym": False}
    named = {"architectures": [TINY[family].model_class], "quantization_config": settings}
    edit_config(tmp_path / "a", lambda content: content.update(named))
    import_folder(tmp_path / "a", tmp_path / "b")
    loaded = load(tmp_path / "b")
    for new, case in cases.values():
        dense = case["scale"].double()[:, case["g_idx"].long()] * (
            case["codes"] - case["zero"][:, case["g_idx"].long()]
        )
        assert torch.equal(loaded.get_submodule(new).dequantize(), dense.float())
    for name, parameter in loaded.named_parameters():
        if not name.rpartition(".")[0].endswith(("q_proj", "fc1", "down_proj")):
            assert torch.equal(parameter, model.get_parameter(name)), name


# --- AWQ ------------------------------------------------------------------------------------------------------------


def awq(case: Case) -> dict[str, Tensor]:
    def words(row: list[int]) -> list[int]:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return [signed(sum(row[c + order[i]] << (4 * i) for i in range(8))) for c in range(0, len(row), 8)]

    return {
        "qweight": torch.tensor([words(row) for row in case["codes"].t().tolist()], dtype=torch.int32),
        "qzeros": torch.tensor([words(row) for row in case["zero"].t().tolist()], dtype=torch.int32),
        "scales": case["scale"].t(),
    }


@pytest.mark.parametrize("group", [8, 16, 32, -1])
def test_awq(group: int, plain: Path, tmp_path: Path) -> None:
    cases = [weight(32, k, 4, group, False, symmetric=k == 32) for k in (64, 32)]
    settings = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}
    source = foreign(plain, tmp_path / "a", awq, cases, **settings, modules_to_not_convert=["vision_model"])
    import_folder(source, tmp_path / "b")
    assert_imported(tmp_path / "b", cases)
    export_folder(tmp_path / "b", tmp_path / "c", "awq")
    assert_same_tensors(source, tmp_path / "c")
    written = settings_of(tmp_path / "c")
    assert {key: written[key] for key in settings} == settings
    for stem in ("vision_model", "qformer", "language_projection", "language_model.lm_head"):
        assert stem in written["modules_to_not_convert"]
    assert not any(stem in name for stem in written["modules_to_not_convert"] for name in LAYERS)


def test_awq_settings_under_their_first_names(plain: Path, tmp_path: Path) -> None:
    cases = [weight(32, k, 4, 16, False) for k in (64, 32)]
    source = foreign(plain, tmp_path / "a", awq, cases)
    edit_config(source, lambda content: content.pop("quantization_config"))
    (source / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 16, "zero_point": true, "version": "GEMM"}')
    import_folder(source, tmp_path / "b")
    assert_imported(tmp_path / "b", cases)


# --- compressed-tensors ---------------------------------------------------------------------------------------------


def compressed(dense: bool, plain_zero: bool = False) -> Callable[[Case], dict[str, Tensor]]:
    def pack(case: Case) -> dict[str, Tensor]:
        bits, (n, k) = case["bits"], case["codes"].shape

        def words(row: list[int]) -> list[int]:
            if dense:
                return naive_stream(row, bits)
            per_word = 32 // bits
            parts = [row[i : i + per_word] for i in range(0, len(row), per_word)]
            return [signed(sum(code << (bits * j) for j, code in enumerate(part))) for part in parts]

        packed = torch.tensor([words(row) for row in case["codes"].tolist()], dtype=torch.int32)
        zero = torch.tensor([words(row) for row in case["zero"].t().tolist()], dtype=torch.int32).t()
        tensors = {"weight_packed": packed, "weight_scale": case["scale"], "weight_shape": torch.tensor([n, k])}
        if plain_zero:
            zero = (case["zero"] - 2 ** (bits - 1)).to(torch.int8)
        if not bool((case["zero"] == 2 ** (bits - 1)).all()):
            tensors["weight_zero_point"] = zero
        if not torch.equal(case["g_idx"], case["g_idx"].sort().values):
            tensors["weight_g_idx"] = case["g_idx"]
        return tensors

    return pack


def scheme(target: str, bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    size = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    return {"targets": [target], "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **size}}


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors(bits: int, group: int, plain: Path, tmp_path: Path) -> None:
    """One layer by its name, before all other linears: the more specific target wins."""
    cases = [weight(32, 64, bits, group, False), weight(32, 32, 4, 8, False, symmetric=True)]
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"rest": scheme("Linear", bits, group, False), "k": scheme("re:.*k_proj$", 4, 8, True)},
    }
    source = foreign(plain, tmp_path / "a", compressed(dense=True), cases, **settings, ignore=["re:.*vision.*"])
    import_folder(source, tmp_path / "b")
    assert_imported(tmp_path / "b", cases)
    export_folder(tmp_path / "b", tmp_path / "c", "compressed-tensors")
    assert_same_tensors(source, tmp_path / "c")


@pytest.mark.parametrize("order", [False, True], ids=["plain", "order"])
@pytest.mark.parametrize("plain_zero", [False, True], ids=["packed", "int8"])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
def test_compressed_tensors_before_0_18(bits: int, plain_zero: bool, order: bool, plain: Path, tmp_path: Path) -> None:
    """Words that no code straddles, zero points as plain int8, column orders."""
    cases = [weight(32, k, bits, 16, order) for k in (64, 32)]
    settings = {
        "quant_method": "compressed-tensors",
        "version": "0.17.1",
        "format": "pack-quantized",
        "config_groups": {"group_0": scheme("Linear", bits, 16, False)},
    }
    source = foreign(plain, tmp_path / "a", compressed(dense=False, plain_zero=plain_zero), cases, **settings)
    import_folder(source, tmp_path / "b")
    assert_imported(tmp_path / "b", cases)
