"""AWQ's files, version GEMM: 4 bits, packed along n.

============ =========================== ===================================================
``qweight``   int32 ``[k, n/8]``          nibble i of word c is the code of row ``8c + ORDER[i]``
``qzeros``    int32 ``[groups, n/8]``     the same of zero points
``scales``    fp16 ``[groups, n]``
============ =========================== ===================================================

One group size for all layers; no ragged groups, no column order. Zero points are always stored: a layer whose zero
points are all in the middle is a symmetric one.

Source: AutoAWQ, `awq/modules/linear/gemm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.exchange.layers import (
    Incoming,
    Layer,
    exact_in,
    expect,
    names_of,
    on_disk,
    scales_like,
    spec_of,
)
from mmq_kernels.checkpoint.exchange.names import stems
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.spec import PER_CHANNEL, QuantSpec

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbouring rows each nibble of a word holds, lowest first."""


class Awq:
    """See the module; `Format` says what each method does."""

    name = method = "awq"
    side_file: str | None = None

    def why_not(self, layer: Layer) -> str:
        spec = layer.spec
        if spec.bits != BITS:
            return f"it has {spec.bits} bits (AWQ's files have 4)"
        if layer.stored.input_scale:
            return "it has an input scale that nothing could absorb (weight_input_scale)"
        if layer.stored.activation_order:
            return "its columns are grouped by activation order"
        if spec.group_size != PER_CHANNEL and layer.k % spec.group_size:
            return f"its last group is shorter ({layer.k} columns in groups of {spec.group_size})"
        if layer.n % len(ORDER):
            return f"its out_features {layer.n} fill no whole 32-bit words"
        if not exact_in(torch.float16, layer.read("weight_scale")):
            return "it has scales that fp16 cannot hold exactly"
        return ""

    def why_not_together(self, layers: Sequence[Layer], left: Sequence[str]) -> str:
        sizes = sorted({layer.spec.group_size for layer in layers})
        if len(sizes) > 1:
            return f"AWQ's files have one group size for all layers, and these have {', '.join(map(str, sizes))}"
        quantized = [layer.name for layer in layers]
        for stem in _not_converted(quantized, left):
            hit = next((name for name in quantized if stem in name), None)
            if hit is not None:
                return f"{stem} is left alone, and AWQ's readers would leave {hit} alone too, whose name contains it"
        return ""

    def caution(self, layers: Sequence[Layer]) -> str:
        return ""

    def encode(self, layer: Layer) -> dict[str, Tensor]:
        tensors = layer.tensors()
        codes = ops.unpack(tensors["weight_packed"], BITS, layer.k)
        return {
            "qweight": _pack(codes.t()),
            "qzeros": _pack(layer.zero().t()),
            "scales": tensors["weight_scale"].t().half().contiguous(),
        }

    def settings(self, layers: Sequence[Layer], left: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": self.method,
            "version": "gemm",
            "bits": BITS,
            "group_size": layers[0].spec.group_size,
            "zero_point": True,
            "modules_to_not_convert": _not_converted([layer.name for layer in layers], left),
        }

    def find(self, settings: Mapping[str, Any], folder: Folder, where: str) -> dict[str, Incoming]:
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if version != "gemm":
            raise CheckpointError(f"{where}: version must be gemm to be imported, got {version!r}")
        bits = settings.get("bits", settings.get("w_bit"))
        if bits != BITS:
            raise CheckpointError(f"{where}: bits must be 4, got {bits!r}")
        group_size = settings.get("group_size", settings.get("q_group_size"))
        found = {}
        for name in names_of(folder, "qweight"):
            spec = spec_of(where, name, bits, group_size, False)
            found[name] = _checked(name, spec, folder)
        return found

    def decode(
        self, name: str, layer: Incoming, settings: Mapping[str, Any], folder: Folder, dtype: torch.dtype
    ) -> tuple[QuantSpec, dict[str, Tensor]]:
        spec, n, k = layer.spec, layer.n, layer.k
        qweight, qzeros, scales = (folder.read(full) for full in layer.tensors)
        words = ops.pack(_unpack(qweight, n).t().contiguous(), BITS)
        zero = _unpack(qzeros, n).t()
        if bool((zero == spec.middle_code).all()):
            spec = QuantSpec(spec.bits, spec.group_size, symmetric=True)
        return spec, on_disk(words, scales_like(scales.t(), dtype), zero, None, spec, n, k)


def _pack(codes: Tensor) -> Tensor:
    """uint8 ``[rows, n]`` -> int32 ``[rows, n/8]``."""
    return ops.pack(codes.unflatten(1, (-1, len(ORDER)))[:, :, list(ORDER)].flatten(1), BITS)


def _unpack(words: Tensor, n: int) -> Tensor:
    """The inverse of `_pack`."""
    back = torch.argsort(torch.tensor(ORDER))
    return ops.unpack(words, BITS, n).unflatten(1, (-1, len(ORDER)))[:, :, back].flatten(1)


def _not_converted(quantized: Sequence[str], left: Sequence[str]) -> list[str]:
    """What to leave alone; readers look for these anywhere in a layer's name."""
    return stems(left, quantized, lambda stem, name: stem in name)


def _checked(name: str, spec: QuantSpec, folder: Folder) -> Incoming:
    """A layer whose tensors have the shapes that its words and the spec imply.

    Raises:
        CheckpointError: naming the tensor that has not.
    """
    qweight, qzeros, scales = (f"{name}.{own}" for own in ("qweight", "qzeros", "scales"))
    shape = folder.entries[qweight].shape
    k, words = shape if len(shape) == 2 else (0, 0)
    n = words * len(ORDER)
    if spec.group_size != PER_CHANNEL and k % spec.group_size:
        raise CheckpointError(
            f"{folder.files[qweight]}: tensor {qweight} must have a multiple of {spec.group_size} rows, got {k}"
        )
    expect(folder, qweight, (k, words), torch.int32)
    expect(folder, qzeros, (spec.groups(k), words), torch.int32)
    expect(folder, scales, (spec.groups(k), n))
    return Incoming(spec, n, k, (qweight, qzeros, scales))
