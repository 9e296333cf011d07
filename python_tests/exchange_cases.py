"""What the tests of export and import share: models whose layers hold chosen codes, and plain readers of folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vlms import make
from torch import Tensor, nn

from mmq_kernels import QuantLinear, QuantSpec
from mmq_kernels.checkpoint import save


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by plain safetensors."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def assert_same_tensors(folder: Path, other: Path) -> None:
    """Names, dtypes, shapes and every bit."""
    ours, theirs = tensors_of(folder), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)), name


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a model's blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    }


def random_layer(
    like: nn.Linear, spec: QuantSpec, *, order: bool = False, input_scale: bool = False, lowest_zero: int = 0
) -> QuantLinear:
    """Random codes with both ends of their range, in the place of a linear; scales of the dtype that we choose."""
    n, k = like.out_features, like.in_features
    groups = spec.groups(k)
    codes = torch.randint(0, spec.max_code + 1, (n, k), dtype=torch.uint8)
    codes[:, 0], codes[:, -1] = 0, spec.max_code
    zero = torch.randint(lowest_zero, spec.max_code + 1, (n, groups), dtype=torch.uint8)
    zero[0], zero[-1] = lowest_zero, spec.max_code
    dtype = like.weight.dtype
    scale = (torch.rand(n, groups) * 0.02 + 1e-3).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    g_idx = (torch.randperm(k) // spec.group_length(k)).int() if order and groups > 1 else None
    return QuantLinear.from_codes(
        codes,
        scale,
        None if spec.symmetric else zero,
        spec,
        bias=None if like.bias is None else like.bias.detach(),
        g_idx=g_idx,
        input_scale=torch.rand(k) + 0.5 if input_scale else None,
        dtype=dtype,
    )


def quantized_folder(
    folder: Path,
    kind: str,
    dtype: torch.dtype,
    chosen: Mapping[str, QuantSpec],
    ordered: frozenset[str] = frozenset(),
    **options: Any,
) -> Path:
    """A folder of ours whose layers `chosen` hold random codes, the `ordered` of them by activation order."""
    model = make(kind, dtype)
    for name, spec in chosen.items():
        parent, _, child = name.rpartition(".")
        layer = random_layer(model.get_submodule(name), spec, order=name in ordered, **options)
        setattr(model.get_submodule(parent), child, layer)
    return save(model, folder)


def naive_stream(codes: list[int], bits: int) -> list[int]:
    """Words of one LSB-first stream, by one big integer."""
    value = sum(code << (i * bits) for i, code in enumerate(codes))
    return [signed(value >> (32 * word) & 0xFFFFFFFF) for word in range(-(-len(codes) * bits // 32))]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def codes_of(words: Tensor, bits: int, count: int) -> Tensor:
    """Our words -> codes int64 ``[rows, count]``, by one big integer a row."""
    rows = []
    for row in words.tolist():
        value = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([value >> (i * bits) & (2**bits - 1) for i in range(count)])
    return torch.tensor(rows)
