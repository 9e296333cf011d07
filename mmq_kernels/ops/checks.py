"""Argument checks of the public ops, shared by the real implementations and the fakes.

Each raises a ValueError that names the argument, what it must be and the value got, before any kernel runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels.backends import ACTIVATION_BITS, ACTIVATIONS, backend_of_layout
from mmq_kernels.ops.choice import parse
from mmq_kernels.ops.repeated import version
from mmq_kernels.spec import QuantSpec

_CHECKED = "_mmq_checked"
"""Attribute of a weight's tensor that remembers a check."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _require(condition: bool, name: str, requirement: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {requirement}, got {got}")


def _float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} dtype must be float16, bfloat16 or float32, got {dtype}")


def _shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _require(tuple(tensor.shape) == shape, f"{name} shape", str(list(shape)), list(tensor.shape))


def _device(name: str, tensor: Tensor, device: torch.device) -> None:
    _require(tensor.device == device, f"{name} device", str(device), tensor.device)


def _columns(perm: Tensor, k: int) -> None:
    """Kernels use `perm` as an index. Looked at once a weight; not in tracing, nor while a graph is captured."""
    if type(perm) is not Tensor or perm.is_meta or (perm.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    low, high = (int(end) for end in perm.aminmax())
    _require(low >= 0 and high < k, "perm", f"column numbers from 0 to {k - 1}", low if low < 0 else high)


def _sizes(n: int, k: int) -> None:
    _require(n >= 1, "n", "at least 1", n)
    _require(k >= 1, "k", "at least 1", k)


def _weight(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    layout: str,
) -> QuantSpec:
    """The runtime tensors of a weight against the numbers that describe them.

    A weight that was found right is marked, with the tensors it came with: the next call of the same layer compares
    identities instead of shapes, and whether `perm` was written to since.
    """
    numbers = (bits, group_size, n, k, layout, None if perm is None else version(perm))
    known = weight.__dict__.get(_CHECKED) if type(weight) is Tensor else None
    if known is not None:
        spec, seen, known_scale, known_zero, known_perm = known
        if seen == numbers and known_scale is scale and known_zero is zero and known_perm is perm:
            return spec
    spec = _check_weight(weight, scale, zero, perm, bits, group_size, n, k, layout)
    if type(weight) is Tensor:
        weight.__dict__[_CHECKED] = (spec, numbers, scale, zero, perm)
    return spec


def _check_weight(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    layout: str,
) -> QuantSpec:
    spec = QuantSpec(bits, group_size, symmetric=zero is None)
    _sizes(n, k)
    shapes = backend_of_layout(layout).runtime_shapes(spec, n, k)
    _require(weight.dtype == torch.int32, "weight dtype", "int32", weight.dtype)
    _shape("weight", weight, shapes.weight)
    _float("scale", scale.dtype)
    _shape("scale", scale, shapes.scale)
    _device("scale", scale, weight.device)
    for name, tensor in (("weight", weight), ("scale", scale), ("zero", zero)):
        if tensor is not None:
            _require(tensor.is_contiguous(), name, "contiguous", f"strides {tensor.stride()}")
    if zero is not None:
        _require(zero.dtype == torch.int32, "zero dtype", "int32", zero.dtype)
        _shape("zero", zero, shapes.zero)
        _device("zero", zero, weight.device)
    if perm is not None:
        _require(perm.dtype == torch.int32, "perm dtype", "int32", perm.dtype)
        _shape("perm", perm, (k,))
        _device("perm", perm, weight.device)
        _columns(perm, k)
    return spec


def gemm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    layout: str,
    activation: str,
    bits_of_x: int = 16,
) -> QuantSpec:
    spec = _weight(weight, scale, zero, perm, bits, group_size, n, k, layout)
    _float("x", x.dtype)
    if x.dim() < 1 or x.shape[-1] != k:  # texts are made only where they are read: a small call takes 100 us
        _require(False, "x shape", f"[..., {k}]", list(x.shape))
    _device("x", x, weight.device)
    _vector("input_scale", input_scale, k, weight.device)
    _vector("bias", bias, n, weight.device)
    if activation not in ACTIVATIONS:
        _require(False, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    activation_bits(bits_of_x)
    return spec


def gemm_transposed(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    input_scale: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    layout: str,
) -> QuantSpec:
    spec = _weight(weight, scale, zero, perm, bits, group_size, n, k, layout)
    _float("grad", grad.dtype)
    _require(grad.dim() >= 1 and grad.shape[-1] == n, "grad shape", f"[..., {n}]", list(grad.shape))
    _device("grad", grad, weight.device)
    _vector("input_scale", input_scale, k, weight.device)
    return spec


def _vector(name: str, vector: Tensor | None, size: int, device: torch.device) -> None:
    if vector is not None:
        _float(name, vector.dtype)
        _shape(name, vector, (size,))
        _device(name, vector, device)


def activation_bits(bits: int) -> None:
    """What x is multiplied as."""
    if bits not in ACTIVATION_BITS:
        _require(False, "activation_bits", " or ".join(map(str, ACTIVATION_BITS)), repr(bits))


def backend(name: str) -> None:
    """The name a call is pinned to, "" for none; `select` checks it too, fakes do not come that far."""
    if name:
        parse(name, "backend")


def dequantize(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    layout: str,
    dtype: torch.dtype,
) -> QuantSpec:
    _float("output", dtype)
    return _weight(weight, scale, zero, perm, bits, group_size, n, k, layout)


def pack(codes: Tensor, bits: int) -> QuantSpec:
    _require(codes.dtype == torch.uint8, "codes dtype", "uint8", codes.dtype)
    _require(codes.dim() == 2, "codes", "a matrix [n, k]", list(codes.shape))
    return QuantSpec(bits)


def unpack(words: Tensor, bits: int, k: int) -> QuantSpec:
    spec = QuantSpec(bits)
    _require(words.dtype == torch.int32, "words dtype", "int32", words.dtype)
    _require(words.dim() == 2, "words", "a matrix [n, words]", list(words.shape))
    _require(words.shape[1] == spec.words(k), "words shape", f"[n, {spec.words(k)}] for k = {k}", list(words.shape))
    return spec


def quantize_rtn(weight: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype) -> QuantSpec:
    _float("weight", weight.dtype)
    _float("scale", scale_dtype)
    _require(weight.dim() == 2, "weight", "a matrix [n, k]", list(weight.shape))
    _sizes(*weight.shape)
    return QuantSpec(bits, group_size, symmetric)


def gptq_block(
    weight: Tensor,
    hinv: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> QuantSpec:
    _require(weight.dim() in (2, 3), "weight", "[n, B] or [layers, n, B]", list(weight.shape))
    _float("scale", scale_dtype)
    spec = QuantSpec(bits, group_size, symmetric)
    _require(weight.dtype == torch.float32, "weight dtype", "float32", weight.dtype)
    _require(hinv.dtype == torch.float32, "hinv dtype", "float32", hinv.dtype)
    *layers, n, columns = weight.shape
    _sizes(n, columns)
    _shape("hinv", hinv, (*layers, columns, columns))
    _device("hinv", hinv, weight.device)
    _require((scale is None) == (zero is None), "scale and zero", "both given or both None", "one of them")
    if scale is not None and zero is not None:
        _float("scale", scale.dtype)
        _require(zero.dtype == torch.uint8, "zero dtype", "uint8", zero.dtype)
        for name, grid in (("scale", scale), ("zero", zero)):
            _shape(name, grid, (*layers, n, spec.groups(columns)))
            _device(name, grid, weight.device)
    return spec
