"""GPTQ's files, v1 and v2: our words transposed.

============ =================================== ==================================================================
``qweight``   int32 ``[ceil(k*b/32), n]``         a column of words is one LSB-first stream of a row's codes; at 3 bits
                                                  32 codes take 3 words
``qzeros``    int32 ``[groups, ceil(n*b/32)]``    zero points, packed along n; v1 stores each minus one
``scales``    fp16 ``[groups, n]``
``g_idx``     int32 ``[k]``                       the group of each column, also where groups are runs of columns
============ =================================== ==================================================================

2, 3, 4 and 8 bits; layers that differ from the rest are `dynamic` overrides. Version 1 cannot say that a zero point is
0: readers differ in what they make of a field below 0, so such layers go into v2. GPTQModel writes them all the same,
by one subtraction from a whole word (at 3 bits from each field), where a 0 borrows from the field above it; files are
read by the reverse of that.

Source: AutoGPTQ's `qlinear_cuda_old`, GPTQModel's `BaseQuantLinear`, `dynamic_get`
and `convert_gptq_v2_to_v1_format_module`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmq_kernels import __version__, ops
from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.exchange.layers import (
    Incoming,
    Layer,
    even_groups,
    exact_in,
    expect,
    names_of,
    on_disk,
    scales_like,
    spec_of,
)
from mmq_kernels.checkpoint.exchange.names import matches, patterns, stems
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.spec import QuantSpec

BITS = (2, 3, 4, 8)


class _Kind(NamedTuple):
    """What may differ from layer to layer, under the names it has in the settings."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


class Gptq:
    """See the module; `Format` says what each method does.

    Args:
        name: gptq for version 1, gptq_v2 for version 2.
    """

    method = "gptq"
    side_file: str | None = "quantize_config.json"

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, layer: Layer) -> str:
        bits = layer.spec.bits
        if bits not in BITS:
            return f"it has {bits} bits (GPTQ's files have 2, 3, 4 or 8)"
        if layer.stored.input_scale:
            return "it has an input scale that nothing could absorb (weight_input_scale)"
        for side, size in (("in_features", layer.k), ("out_features", layer.n)):
            if size * bits % 32:
                return f"its {side} {size} at {bits} bits fill no whole 32-bit words"
        if not exact_in(torch.float16, layer.read("weight_scale")):
            return "it has scales that fp16 cannot hold exactly"
        if self.name == "gptq" and bool((layer.zero() == 0).any()):
            return "it has zero points of 0, which version 1 stores as -1"
        return ""

    def why_not_together(self, layers: Sequence[Layer], left: Sequence[str]) -> str:
        return ""

    def caution(self, layers: Sequence[Layer]) -> str:
        return ""

    def encode(self, layer: Layer) -> dict[str, Tensor]:
        tensors = layer.tensors()
        zero = layer.zero().t() - (1 if self.name == "gptq" else 0)
        g_idx = tensors.get("weight_g_idx")
        return {
            "qweight": tensors["weight_packed"].t().contiguous(),
            "qzeros": ops.pack(zero.contiguous(), layer.spec.bits),
            "scales": tensors["weight_scale"].t().half().contiguous(),
            "g_idx": even_groups(layer.spec, layer.k) if g_idx is None else g_idx,
        }

    def settings(self, layers: Sequence[Layer], left: Sequence[str]) -> dict[str, Any]:
        alike: dict[_Kind, list[str]] = {}
        for layer in layers:
            alike.setdefault(_kind(layer), []).append(layer.name)
        usual = Counter({kind: len(names) for kind, names in alike.items()}).most_common(1)[0][0]
        quantized = [layer.name for layer in layers]
        dynamic: dict[str, dict[str, Any]] = {f"-:{re.escape(stem)}(\\.|$)": {} for stem in stems(left, quantized)}
        for kind, names in alike.items():
            if kind != usual:
                own = {key: value for key, value in kind._asdict().items() if value != getattr(usual, key)}
                dynamic |= {f"+:{found}": own for found in patterns(names, {*quantized, *left} - set(names))}
        return {
            "quant_method": self.method,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            **usual._asdict(),
            "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in quantized),
            "dynamic": dynamic,
            "meta": {"quantizer": [f"mmq_kernels:{__version__}"]},
        }

    def find(self, settings: Mapping[str, Any], folder: Folder, where: str) -> dict[str, Incoming]:
        version = _version(settings)
        if version not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"{where}: checkpoint_format must be gptq or gptq_v2 to be imported, got {version!r}")
        if settings.get("pack_dtype") not in (None, "int32"):
            raise CheckpointError(f"{where}: pack_dtype must be int32, got {settings['pack_dtype']!r}")
        dynamic = settings.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(isinstance(values, dict) for values in dynamic.values()):
            raise CheckpointError(f"{where}: dynamic must be an object of objects, got {dynamic!r}")
        found = {}
        for name in names_of(folder, "qweight"):
            own = {**settings, **_override(name, settings, where)}
            if own.get("bits") not in BITS:
                raise CheckpointError(f"{where}: layer {name}: bits must be 2, 3, 4 or 8, got {own.get('bits')!r}")
            spec = spec_of(where, name, own["bits"], own.get("group_size", 128), own.get("sym", True) is True)
            found[name] = _checked(name, spec, folder)
        return found

    def decode(
        self, name: str, layer: Incoming, settings: Mapping[str, Any], folder: Folder, dtype: torch.dtype
    ) -> tuple[QuantSpec, dict[str, Tensor]]:
        spec, n, k = layer.spec, layer.n, layer.k
        tensors = {full.removeprefix(f"{name}."): folder.read(full) for full in layer.tensors}
        zero = _zero(tensors["qzeros"], spec, n, _version(settings)).t()
        if spec.symmetric and not bool((zero == spec.middle_code).all()):
            spec = QuantSpec(spec.bits, spec.group_size)
        scale = scales_like(tensors["scales"].t(), dtype)
        return spec, on_disk(tensors["qweight"].t(), scale, zero, tensors.get("g_idx"), spec, n, k)


def _zero(qzeros: Tensor, spec: QuantSpec, n: int, version: str) -> Tensor:
    """Zero points uint8 ``[groups, n]``; version 1 took one from each."""
    if version == "gptq_v2":
        return ops.unpack(qzeros, spec.bits, n)
    if spec.bits == 3:
        return (ops.unpack(qzeros, spec.bits, n) + 1) & spec.max_code
    ones = sum(1 << i for i in range(0, 32, spec.bits))
    return ops.unpack(qzeros + ones, spec.bits, n)  # int32 wraps around, as it did when they were taken


def _kind(layer: Layer) -> _Kind:
    return _Kind(layer.spec.bits, layer.spec.group_size, layer.spec.symmetric, layer.stored.activation_order)


def _version(settings: Mapping[str, Any]) -> str:
    """Files from before there were two versions say neither."""
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()


def _override(name: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the first `dynamic` expression that matches a layer says of it."""
    for expression, values in (settings.get("dynamic") or {}).items():
        if not expression.startswith("-:") and matches(expression.removeprefix("+:"), name, where):
            return values
    return {}


def _checked(name: str, spec: QuantSpec, folder: Folder) -> Incoming:
    """A layer whose tensors have the shapes that the spec and its scales imply.

    Raises:
        CheckpointError: naming the tensor that has not.
    """
    qweight, qzeros, scales, g_idx = (f"{name}.{own}" for own in ("qweight", "qzeros", "scales", "g_idx"))
    names = [qweight, qzeros, scales]
    shape = folder.entries[qweight].shape
    n = shape[-1] if shape else 0
    if g_idx in folder.entries:
        names.append(g_idx)
        k = folder.entries[g_idx].shape[0] if folder.entries[g_idx].shape else 0
        expect(folder, g_idx, (k,), torch.int32)
    else:
        k = shape[0] * 32 // spec.bits if shape else 0
    expect(folder, qweight, (spec.words(k), n), torch.int32)
    expect(folder, qzeros, (spec.groups(k), spec.words(n)), torch.int32)
    expect(folder, scales, (spec.groups(k), n))
    return Incoming(spec, n, k, tuple(names))
