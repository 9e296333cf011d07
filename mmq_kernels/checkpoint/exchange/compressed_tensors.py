"""compressed-tensors, format `pack-quantized`: our own words, and a config that names the layers of each width.

===================== ============================== ======================================================
``weight_packed``      int32 ``[n, ceil(k*b/32)]``     one LSB-first stream a row; a code is the signed value
                                                       plus ``2**(b-1)``
``weight_scale``       ``[n, groups]``                 of the model's dtype
``weight_zero_point``  int32 ``[ceil(n*b/32), groups]``  asymmetric only, packed along n
``weight_shape``       int64 ``[2]``                   n, k
===================== ============================== ======================================================

Every width from 2 to 8, several in one file. Its config then lists each layer by name: readers that call layers by
other names than the file does rewrite names, but not expressions. Not carried: ragged last groups (readers reshape a
row into groups) and column orders (``actorder: group``, which version 0.19 removed). Files from before version 0.18 are
read too: they pad 3, 5, 6 and 7 bits to ``32 // b`` codes a word, may store zero points as plain int8, and may have
`weight_g_idx`.

Source: compressed-tensors 0.20, `compressors/pack_quantized` and `quantization/quant_args.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.exchange.layers import (
    Incoming,
    Layer,
    expect,
    names_of,
    on_disk,
    spec_of,
    unpack_zero,
)
from mmq_kernels.checkpoint.exchange.names import matches
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.spec import PER_CHANNEL, QuantSpec, ceil_div

_PACKED = "pack-quantized"
_DENSE_SINCE = (0, 18)
_WRITTEN_AS = "0.20.0"
"""The version whose layout we write."""
_CAUTION = (
    "{} layers are asymmetric, which from_pretrained of transformers (4.57 to 5.23) does not load: it expects another "
    "shape of the packed zero points; symmetric layers load"
)


class CompressedTensors:
    """See the module; `Format` says what each method does."""

    name = method = "compressed-tensors"
    side_file: str | None = None

    def why_not(self, layer: Layer) -> str:
        if layer.stored.input_scale:
            return "it has an input scale that nothing could absorb (weight_input_scale)"
        if layer.stored.activation_order:
            return "its columns are grouped by activation order, which compressed-tensors no longer reads"
        if _ragged(layer):
            return f"its last group is shorter ({layer.k} columns in groups of {layer.spec.group_size})"
        return ""

    def why_not_together(self, layers: Sequence[Layer], left: Sequence[str]) -> str:
        return ""

    def caution(self, layers: Sequence[Layer]) -> str:
        asymmetric = sum(not layer.spec.symmetric for layer in layers)
        return _CAUTION.format(asymmetric) if asymmetric else ""

    def encode(self, layer: Layer) -> dict[str, Tensor]:
        return layer.tensors()

    def settings(self, layers: Sequence[Layer], left: Sequence[str]) -> dict[str, Any]:
        alike: dict[tuple[int, int, bool], list[str]] = {}
        for layer in layers:
            alike.setdefault((layer.spec.bits, _group_size(layer), layer.spec.symmetric), []).append(layer.name)
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(alike) == 1 else names,
                "weights": _weights(bits, group_size, symmetric),
                "input_activations": None,
                "output_activations": None,
                "format": _PACKED,
            }
            for number, ((bits, group_size, symmetric), names) in enumerate(alike.items())
        }
        return {
            "quant_method": self.method,
            "version": _WRITTEN_AS,
            "format": _PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(left),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def find(self, settings: Mapping[str, Any], folder: Folder, where: str) -> dict[str, Incoming]:
        schemes, padded = _schemes(settings, where), _is_padded(settings, where)
        found = {}
        for name in names_of(folder, "weight_packed"):
            weights = _scheme_of(name, schemes, where)
            group_size = weights.get("group_size") if weights.get("strategy") == "group" else PER_CHANNEL
            spec = spec_of(where, name, weights.get("num_bits"), group_size, bool(weights.get("symmetric", True)))
            found[name] = _checked(name, spec, folder, padded)
        return found

    def decode(
        self, name: str, layer: Incoming, settings: Mapping[str, Any], folder: Folder, dtype: torch.dtype
    ) -> tuple[QuantSpec, dict[str, Tensor]]:
        spec, n, k = layer.spec, layer.n, layer.k
        tensors = {full.removeprefix(f"{name}."): folder.read(full) for full in layer.tensors}
        words, zero = tensors["weight_packed"], tensors.get("weight_zero_point")
        padded = _is_padded(settings, name)
        if padded:
            words = ops.pack(_unpack_padded(words, spec.bits, k), spec.bits)
        if zero is not None and zero.dtype == torch.int8:
            zero = (zero.to(torch.int16) + spec.middle_code).to(torch.uint8)
        elif zero is not None and padded:
            zero = _unpack_padded(zero.t(), spec.bits, n).t()
        elif zero is not None:
            zero = unpack_zero(zero, spec.bits, n)
        return spec, on_disk(words, tensors["weight_scale"], zero, tensors.get("weight_g_idx"), spec, n, k)


def _ragged(layer: Layer) -> bool:
    size = layer.spec.group_size
    return size != PER_CHANNEL and size < layer.k and layer.k % size != 0


def _group_size(layer: Layer) -> int:
    """A group that is longer than the row is the row."""
    return PER_CHANNEL if layer.spec.group_size > layer.k else layer.spec.group_size


def _weights(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    grouped = group_size != PER_CHANNEL
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": group_size if grouped else None,
        "dynamic": False,
    }


def _schemes(settings: Mapping[str, Any], where: str) -> list[tuple[list[str], Mapping[str, Any]]]:
    """Targets and weight scheme of each config group, in order.

    Raises:
        CheckpointError: for anything but packed integer weights.
    """
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if settings.get(key):
            raise CheckpointError(f"{where}: {key} must be empty to be imported, got {settings[key]!r}")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where}: config_groups must be an object of objects, got {groups!r}")
    found: list[tuple[list[str], Mapping[str, Any]]] = []
    for number, group in groups.items():
        weights, targets = group.get("weights"), group.get("targets")
        if not isinstance(weights, dict) or not isinstance(targets, list):
            raise CheckpointError(f"{where}: {number} must have weights and a list of targets, got {group!r}")
        required = {
            "format": (group.get("format") or settings.get("format"), (_PACKED,)),
            "weights.type": (weights.get("type", "int"), ("int",)),
            "weights.strategy": (weights.get("strategy"), ("group", "channel")),
            "weights.dynamic": (weights.get("dynamic", False), (False,)),
            "input_activations": (group.get("input_activations"), (None,)),
            "output_activations": (group.get("output_activations"), (None,)),
        }
        for key, (value, allowed) in required.items():
            if value not in allowed:
                wanted = " or ".join(map(repr, allowed))
                raise CheckpointError(f"{where}: {number}.{key} must be {wanted} to be imported, got {value!r}")
        found.append((targets, weights))
    return found


def _scheme_of(name: str, schemes: list[tuple[list[str], Mapping[str, Any]]], where: str) -> Mapping[str, Any]:
    """The scheme whose target is the layer's name; else an expression that matches it; else its class."""
    for reached in (_is_name, _is_match, _is_class):
        for targets, weights in schemes:
            if any(reached(target, name, where) for target in targets):
                return weights
    raise CheckpointError(f"{where}: no target of config_groups reaches layer {name}, which has packed weights")


def _is_name(target: str, name: str, where: str) -> bool:
    return target == name


def _is_match(target: str, name: str, where: str) -> bool:
    return target.startswith("re:") and matches(target.removeprefix("re:"), name, where)


def _is_class(target: str, name: str, where: str) -> bool:
    return target == "Linear"


def _checked(name: str, spec: QuantSpec, folder: Folder, padded: bool) -> Incoming:
    """A layer whose tensors have the shapes that `weight_shape` and the spec imply.

    Raises:
        CheckpointError: naming the tensor that has not.
    """
    packed, scale, shape, zero, g_idx = (
        f"{name}.weight_{own}" for own in ("packed", "scale", "shape", "zero_point", "g_idx")
    )
    expect(folder, shape, (2,), torch.int64, torch.int32)
    n, k = (int(size) for size in folder.read(shape))
    if min(n, k) < 1:
        raise CheckpointError(f"{folder.files[shape]}: tensor {shape} must hold two positive sizes, got {[n, k]}")
    words = _padded_words if padded else lambda count, bits: spec.words(count)
    expect(folder, packed, (n, words(k, spec.bits)), torch.int32)
    expect(folder, scale, (n, spec.groups(k)))
    names = [packed, scale, shape]
    if not spec.symmetric:
        names.append(zero)
        if zero in folder.entries and folder.entries[zero].dtype == torch.int8:
            expect(folder, zero, (n, spec.groups(k)), torch.int8)
        else:
            expect(folder, zero, (words(n, spec.bits), spec.groups(k)), torch.int32)
    if g_idx in folder.entries:
        names.append(g_idx)
        expect(folder, g_idx, (k,), torch.int32)
    return Incoming(spec, n, k, tuple(names))


def _is_padded(settings: Mapping[str, Any], where: str) -> bool:
    """Whether words were written before codes could straddle two of them."""
    version = settings.get("version")
    if version is None:
        return False
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if numbers is None:
        raise CheckpointError(f"{where}: version must be like {_WRITTEN_AS}, got {version!r}")
    return tuple(int(number) for number in numbers.groups()) < _DENSE_SINCE


def _padded_words(count: int, bits: int) -> int:
    return ceil_div(count, 32 // bits)


def _unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Words int32 ``[rows, ceil(count / (32 // bits))]`` that no code straddles -> codes uint8 ``[rows, count]``."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)  # the shift is arithmetic: masked afterwards
    return codes.flatten(1)[:, :count].to(torch.uint8)
