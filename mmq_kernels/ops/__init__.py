"""The public ops, ``torch.ops.mmq.*``: schemas, fakes, and the functions Python calls; their gradients are elsewhere.

A weight travels as its runtime tensors plus the plain numbers that give them a meaning (bits, group_size, n, k and
the layout's name); `RuntimeWeight` and `QuantLinear` keep them together. Every function here checks its arguments
(`checks.py`), asks `choice.py` for a backend and calls it; nothing else in the package talks to a backend's kernels.
What comes out is contiguous whatever came in, which is what the fakes promise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels import backends
from mmq_kernels.backends import RuntimeWeight
from mmq_kernels.ops import checks, dispatch, gradients, repeated
from mmq_kernels.ops.choice import Choice, explain_all, forced_backend, select, use_backend
from mmq_kernels.ops.descent import descend, search_grid
from mmq_kernels.spec import QuantSpec

__all__ = [
    "Choice",
    "dequantize",
    "descend",
    "explain_all",
    "forced_backend",
    "gemm",
    "gptq_block",
    "pack",
    "quantize_rtn",
    "search_grid",
    "select",
    "unpack",
    "use_backend",
]

_WEIGHT = "Tensor weight, Tensor scale, Tensor? zero, Tensor? perm"
_NUMBERS = "int bits, int group_size, int n, int k, str layout"

_SCHEMAS = (
    f"gemm(Tensor x, {_WEIGHT}, Tensor? input_scale, Tensor? bias, {_NUMBERS}, str activation, str backend='',"
    " int activation_bits=16) -> Tensor",
    f"gemm_transposed(Tensor grad, {_WEIGHT}, Tensor? input_scale, {_NUMBERS}, str backend='') -> Tensor",
    f"dequantize({_WEIGHT}, {_NUMBERS}, ScalarType dtype) -> Tensor",
    "pack(Tensor codes, int bits) -> Tensor",
    "unpack(Tensor words, int bits, int k) -> Tensor",
    "quantize_rtn(Tensor weight, int bits, int group_size, bool symmetric, ScalarType scale_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    "gptq_block(Tensor weight, Tensor hinv, Tensor? scale, Tensor? zero, int bits, int group_size,"
    " bool symmetric, ScalarType scale_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
)

_library = torch.library.Library("mmq", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)


# --- gemm -------------------------------------------------------------------------------------------------------------


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
    activation: str = "none",
    backend: str = "",
    activation_bits: int = 16,
) -> Tensor:
    """``y = activation((x / input_scale)[..., perm] @ W^T + bias)``, accumulated in fp32.

    Args:
        x: ``[..., k]``, fp16, bf16 or (CPU, reference) fp32; any leading dims, any number of rows, 0 included. Where
            autocast is on, it is brought to its dtype, as `torch.nn.functional.linear` does.
        weight, scale, zero: runtime tensors of W ``[n, k]`` as a backend's `prepack` made them; zero None: symmetric.
        perm: int32 ``[k]``, the input column that each stored column multiplies (activation order), or None.
        input_scale: ``[k]`` divisor of x, or None.
        bias: ``[n]``, or None.
        activation: none, relu, gelu, gelu_tanh, quick_gelu or silu.
        backend: "triton", "cuda/packed" and the like must serve this call, whatever `use_backend` says; "": any may.
        activation_bits: 8 rounds each token of x to integers in [-127, 127] of its own unit ``max |x| / 127`` and
            multiplies integers, which is faster and off by at most ``max |x| / 254 * sum of |W[n]|`` at each output;
            on the CPU only. Gradients are those of the product with x as it is. 16: x as it is.

    Returns:
        ``[..., n]`` in x's dtype.

    Raises:
        ValueError: naming the argument, its requirement and the value got.
        RuntimeError: when a forced backend cannot serve the call.
    """
    numbers = (bits, group_size, n, k, layout, activation, backend, activation_bits)
    return product(x, weight, scale, zero, perm, input_scale, bias, numbers)


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    numbers: tuple[int | str, ...],
) -> Tensor:
    """`gemm` with its numbers in one tuple, which a layer keeps: made anew, they would be looked up at every call."""
    if not torch.compiler.is_compiling():
        last = repeated.last_call(weight)
        y = None if last is None else last.again(x, weight, scale, zero, perm, input_scale, bias, numbers)
        if y is not None:
            return y
    if dispatch.straight(x):
        with torch._C._AutoDispatchBelowAutograd():
            return _product(x, weight, scale, zero, perm, input_scale, bias, numbers)
    return torch.ops.mmq.gemm.default(dispatch.autocast(x), weight, scale, zero, perm, input_scale, bias, *numbers)


def _gemm(x, weight, scale, zero, perm, input_scale, bias, *numbers):
    numbers += ("", 16)[len(numbers) - 6 :]  # torch leaves out defaults at the end
    return _product(x, weight, scale, zero, perm, input_scale, bias, numbers)


def _product(x, weight, scale, zero, perm, input_scale, bias, numbers):
    _, _, n, k, layout, activation, _, activation_bits = numbers
    others, last = (scale, zero, perm, input_scale, bias), repeated.last_call(weight)
    if last is None or not last.was(x, *others, numbers):
        found = _find(x, (weight, *others), numbers)
        repeated.keep(x, weight, *others, numbers, found)
    else:
        found = last.found
    matrix = x.dim() == 2
    rows = (x if matrix else x.reshape(-1, k)).contiguous()
    chosen = found.backend
    arguments = (rows, RuntimeWeight(weight, scale, zero), bias, found.spec, n, layout, activation, perm, input_scale)
    y = chosen.gemm(*arguments, found.kernel) if activation_bits == 16 else chosen.gemm_integer(*arguments)
    return y if matrix else torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], n])  # no view of what nobody has


def _find(x, tensors, numbers):
    """Spec, backend and kernel of a product, once its arguments are found right."""
    bits, group_size, n, k, layout, activation, backend, activation_bits = numbers
    checked = (*tensors, bits, group_size, n, k, layout, activation, activation_bits)
    spec = checks.gemm(x, *checked)
    about = {"spec": spec, "dtype": x.dtype, "layout": layout, "m": x.numel() // k, "n": n, "k": k}
    choice = select("gemm", x.device, **about, forced=backend or None, activation_bits=activation_bits)
    return repeated.Found(spec, backends.backend(choice.backend), choice.kernel)


def _gemm_fake(
    x,
    weight,
    scale,
    zero,
    perm,
    input_scale,
    bias,
    bits,
    group_size,
    n,
    k,
    layout,
    activation,
    backend="",
    activation_bits=16,
):
    checks.gemm(
        x, weight, scale, zero, perm, input_scale, bias, bits, group_size, n, k, layout, activation, activation_bits
    )
    checks.backend(backend)
    return x.new_empty(*x.shape[:-1], n)


def _gemm_transposed(grad, weight, scale, zero, perm, input_scale, bits, group_size, n, k, layout, backend=""):
    """``(grad @ W) / input_scale``, ``[..., n] -> [..., k]``: what autograd wants of `gemm`."""
    checks.gemm_transposed(grad, weight, scale, zero, perm, input_scale, bits, group_size, n, k, layout)
    dense = _dequantize(weight, scale, zero, perm, bits, group_size, n, k, layout, grad.dtype, backend)
    with torch.autocast(grad.device.type, enabled=False):  # the forward chose the dtype already
        found = grad.reshape(-1, n) @ dense
    if input_scale is not None:
        found /= input_scale.to(found.dtype)
    return found.view(*grad.shape[:-1], k)


def _gemm_transposed_fake(grad, weight, scale, zero, perm, input_scale, bits, group_size, n, k, layout, backend=""):
    checks.gemm_transposed(grad, weight, scale, zero, perm, input_scale, bits, group_size, n, k, layout)
    checks.backend(backend)
    return grad.new_empty(*grad.shape[:-1], k)


# --- dequantize -------------------------------------------------------------------------------------------------------


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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``W = scale * (q - zero)`` as ``[n, k]``, columns in input order, rounded once to `dtype`.

    Raises:
        ValueError: naming the argument, its requirement and the value got.
    """
    return torch.ops.mmq.dequantize(weight, scale, zero, perm, bits, group_size, n, k, layout, dtype)


def _dequantize(weight, scale, zero, perm, bits, group_size, n, k, layout, dtype, backend=""):
    spec = checks.dequantize(weight, scale, zero, perm, bits, group_size, n, k, layout, dtype)
    forced = backend or None
    choice = select("dequantize", weight.device, spec=spec, dtype=dtype, layout=layout, n=n, k=k, forced=forced)
    runtime = RuntimeWeight(weight, scale, zero)
    dense = backends.backend(choice.backend).dequantize(runtime, spec, n, k, layout, dtype)
    if perm is None:
        return dense
    return torch.empty_like(dense).index_copy_(1, perm.long(), dense)


def _dequantize_fake(weight, scale, zero, perm, bits, group_size, n, k, layout, dtype):
    checks.dequantize(weight, scale, zero, perm, bits, group_size, n, k, layout, dtype)
    return weight.new_empty(n, k, dtype=dtype)


# --- pack, unpack -----------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[n, k]``, each below ``2**bits`` -> dense LSB-first words int32 ``[n, ceil(k*bits/32)]``.

    Raises:
        ValueError: for another dtype or rank, bits outside 2..8, or a code that does not fit.
    """
    return torch.ops.mmq.pack(codes, bits)


def _pack(codes, bits):
    checks.pack(codes, bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes must be below 2**{bits}, got {int(codes.max())}")
    choice = select("pack", codes.device)
    return backends.backend(choice.backend).pack(codes.contiguous(), bits)


def _pack_fake(codes, bits):
    spec = checks.pack(codes, bits)
    return codes.new_empty(codes.shape[0], spec.words(codes.shape[1]), dtype=torch.int32)


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """Words int32 ``[n, ceil(k*bits/32)]`` -> codes uint8 ``[n, k]``: the inverse of `pack`.

    Raises:
        ValueError: for another dtype or shape, or bits outside 2..8.
    """
    return torch.ops.mmq.unpack(words, bits, k)


def _unpack(words, bits, k):
    checks.unpack(words, bits, k)
    choice = select("unpack", words.device)
    return backends.backend(choice.backend).unpack(words.contiguous(), bits, k)


def _unpack_fake(words, bits, k):
    checks.unpack(words, bits, k)
    return words.new_empty(words.shape[0], k, dtype=torch.uint8)


# --- quantizers -------------------------------------------------------------------------------------------------------


def quantize_rtn(
    weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest on each group's min-max grid: ``q = clamp(rint(W / scale) + zero, 0, 2^bits - 1)``.

    Args:
        weight: ``[n, k]`` fp16, bf16 or fp32, finite.
        spec: bits, group size, symmetry.
        scale_dtype: dtype that the scales are rounded to *before* codes are chosen.

    Returns:
        codes uint8 ``[n, k]``, scale ``[n, groups]``, zero uint8 ``[n, groups]``.

    Raises:
        ValueError: naming the argument, its requirement and the value got.
    """
    return torch.ops.mmq.quantize_rtn(weight, spec.bits, spec.group_size, spec.symmetric, scale_dtype)


def _quantize_rtn(weight, bits, group_size, symmetric, scale_dtype):
    spec = checks.quantize_rtn(weight, bits, group_size, symmetric, scale_dtype)
    choice = select("quantize_rtn", weight.device, spec=spec, dtype=weight.dtype)
    return backends.backend(choice.backend).quantize_rtn(weight.contiguous(), spec, scale_dtype)


def _quantize_rtn_fake(weight, bits, group_size, symmetric, scale_dtype):
    spec = checks.quantize_rtn(weight, bits, group_size, symmetric, scale_dtype)
    n, k = weight.shape
    groups = spec.groups(k)
    return (
        weight.new_empty(n, k, dtype=torch.uint8),
        weight.new_empty(n, groups, dtype=scale_dtype),
        weight.new_empty(n, groups, dtype=torch.uint8),
    )


def gptq_block(
    weight: Tensor,
    hinv: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    spec: QuantSpec,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block of columns of GPTQ: quantize column j, spread its error over the columns to its right in the block.

    For j = 0..B-1: ``q_j = nearest code of w_j``; ``e_j = (w_j - scale * (q_j - zero)) / hinv[j, j]``;
    ``w_i -= e_j * hinv[j, i]`` for i > j. The caller applies the trailing update ``W_right -= e @ hinv_right``.

    Args:
        weight: fp32 ``[n, B]``, the block with the errors of earlier blocks already applied; not modified. Or
            ``[layers, n, B]``: layers of one shape at once, every other tensor then with the same first dimension.
        hinv: fp32 ``[B, B]``, diagonal block of the upper Cholesky factor U of the inverse Hessian (H^-1 = U^T U).
        scale, zero: ``[n, ceil(B / group_size)]`` (zero uint8), or both None: each group's min-max grid is then
            found from its current columns when the loop reaches it.
        spec: bits, group size within the block (-1: one group), symmetry.
        scale_dtype: dtype of the scales found.

    Returns:
        codes uint8 ``[n, B]``, errors fp32 ``[n, B]``, scale and zero ``[n, groups]`` (those given, or found).

    Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1.

    Raises:
        ValueError: naming the argument, its requirement and the value got.
    """
    return torch.ops.mmq.gptq_block(weight, hinv, scale, zero, spec.bits, spec.group_size, spec.symmetric, scale_dtype)


def _gptq_block(weight, hinv, scale, zero, bits, group_size, symmetric, scale_dtype):
    spec = checks.gptq_block(weight, hinv, scale, zero, bits, group_size, symmetric, scale_dtype)
    choice = select("gptq_block", weight.device, spec=spec, dtype=weight.dtype)
    backend = backends.backend(choice.backend)
    run = backend.gptq_block if weight.dim() == 2 else backend.gptq_blocks
    return tuple(part.contiguous() for part in run(weight, hinv, scale, zero, spec, scale_dtype))


def _gptq_block_fake(weight, hinv, scale, zero, bits, group_size, symmetric, scale_dtype):
    spec = checks.gptq_block(weight, hinv, scale, zero, bits, group_size, symmetric, scale_dtype)
    *rows, columns = weight.shape
    groups = spec.groups(columns)
    dtype = scale_dtype if scale is None else scale.dtype
    return (
        weight.new_empty(*rows, columns, dtype=torch.uint8),
        weight.new_empty(*rows, columns),
        weight.new_empty(*rows, groups, dtype=dtype),
        weight.new_empty(*rows, groups, dtype=torch.uint8),
    )


for _name, _impl, _fake in (
    ("gemm", _gemm, _gemm_fake),
    ("gemm_transposed", _gemm_transposed, _gemm_transposed_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("pack", _pack, _pack_fake),
    ("unpack", _unpack, _unpack_fake),
    ("quantize_rtn", _quantize_rtn, _quantize_rtn_fake),
    ("gptq_block", _gptq_block, _gptq_block_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmq::{_name}", _fake, lib=_library)
gradients.register(_library)
