"""The reference backend: every op in plain torch, on any device, in any layout. Correct first, never fast."""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels import backends, packing
from mmq_kernels.backends import Call, PackedWeight, RuntimeWeight, transformed
from mmq_kernels.backends.integer import multiply_integers
from mmq_kernels.backends.planes import PlanesBackend
from mmq_kernels.spec import QuantSpec


class ReferenceBackend(PlanesBackend):
    """Reads every layout, by way of the on-disk tensors."""

    name = "reference"
    activation_bits = (16, 8)

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, call: Call) -> str | None:
        if call.activation_bits != 16 and call.device.type != "cpu":
            return f"activation_bits {call.activation_bits} is for the CPU, the device is {call.device.type}"
        return None

    def gemm(
        self,
        x: Tensor,
        runtime: RuntimeWeight,
        bias: Tensor | None,
        spec: QuantSpec,
        n: int,
        layout: str,
        activation: str,
        perm: Tensor | None = None,
        input_scale: Tensor | None = None,
        kernel: str = "",
    ) -> Tensor:
        x = transformed(x, perm, input_scale)
        weight = self.dequantize(runtime, spec, n, x.shape[1], layout, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # the caller chose the dtype already
            y = x.float() @ weight.t()
        if bias is not None:
            y += bias.float()
        return activate(y, activation).to(x.dtype)

    def gemm_integer(
        self,
        x: Tensor,
        runtime: RuntimeWeight,
        bias: Tensor | None,
        spec: QuantSpec,
        n: int,
        layout: str,
        activation: str,
        perm: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> Tensor:
        x = transformed(x, perm, input_scale)
        packed = backends.backend_of_layout(layout).unprepack(runtime, spec, n, x.shape[1])
        y = multiply_integers(x, packed, spec, n)
        if bias is not None:
            y += bias.to(x.dtype).float()
        return activate(y, activation).to(x.dtype)

    def dequantize(
        self, runtime: RuntimeWeight, spec: QuantSpec, n: int, k: int, layout: str, dtype: torch.dtype
    ) -> Tensor:
        packed = backends.backend_of_layout(layout).unprepack(runtime, spec, n, k)
        return dequantize_packed(packed, spec, n, k, dtype)

    def quantize_rtn(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        n, k = weight.shape
        length, groups = max(1, spec.group_length(k)), spec.groups(k)
        codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(n, groups, dtype=scale_dtype, device=weight.device)
        zero = torch.empty(n, groups, dtype=torch.uint8, device=weight.device)
        for group in range(groups):
            columns = slice(group * length, min(k, (group + 1) * length))
            part = weight[:, columns].float()
            scale[:, group], zero[:, group] = group_grid(part, spec, scale_dtype)
            codes[:, columns] = encode(part, scale[:, group : group + 1], zero[:, group : group + 1], spec)
        return codes, scale, zero

    def gptq_block(
        self,
        weight: Tensor,
        hinv: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, columns = weight.shape
        weight = weight.clone()
        length, groups = max(1, spec.group_length(columns)), spec.groups(columns)
        search = scale is None or zero is None
        if scale is None or zero is None:
            scale = torch.empty(n, groups, dtype=scale_dtype, device=weight.device)
            zero = torch.empty(n, groups, dtype=torch.uint8, device=weight.device)
        else:
            scale, zero = scale.clone(), zero.clone()
        codes = torch.empty(n, columns, dtype=torch.uint8, device=weight.device)
        error = torch.empty_like(weight)
        for j in range(columns):
            group = j // length
            if search and j % length == 0:
                part = weight[:, j : min(columns, j + length)]
                scale[:, group], zero[:, group] = group_grid(part, spec, scale_dtype)
            s, z = scale[:, group].float(), zero[:, group].float()
            code = encode(weight[:, j], s, z, spec)
            codes[:, j] = code
            error[:, j] = (weight[:, j] - s * (code.float() - z)) / hinv[j, j]
            if j + 1 < columns:
                # Multiply, then subtract: the compiled kernels round twice too, so that all agree bit for bit.
                weight[:, j + 1 :] -= error[:, j, None] * hinv[j, j + 1 :]
        return codes, error, scale, zero


def group_grid(part: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Min-max grid of one group of columns fp32 ``[n, length]`` -> scale ``[n]`` in `scale_dtype`, zero uint8 ``[n]``.

    The range always holds 0; an all-zero group gets scale 1; a scale too small for its dtype is raised to the
    smallest normal number, so that nothing divides by zero.
    """
    return range_grid(part.amin(1).clamp(max=0), part.amax(1).clamp(min=0), spec, scale_dtype)


def range_grid(low: Tensor, high: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of ranges ``[low, high]`` that hold 0, fp32 ``[n]`` each."""
    if spec.symmetric:
        span = 2 * torch.maximum(-low, high)
    else:
        span = high - low
    scale = (span / spec.max_code).to(scale_dtype)
    scale = scale.clamp(min=torch.finfo(scale_dtype).tiny).masked_fill(span == 0, 1)
    if spec.symmetric:
        zero = torch.full_like(scale, spec.middle_code, dtype=torch.uint8)
    else:
        zero = torch.round(-low / scale.float()).clamp(0, spec.max_code).to(torch.uint8)
    return scale, zero


def encode(weight: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Nearest codes uint8 of `weight` on a grid; halves round to even."""
    return (torch.round(weight / scale.float()) + zero.float()).clamp(0, spec.max_code).to(torch.uint8)


def dequantize_packed(packed: PackedWeight, spec: QuantSpec, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """On-disk tensors -> ``scale * (q - zero)`` ``[n, k]``."""
    codes = packing.unpack_stream(packed.words, spec.bits, k).float()
    length = max(1, spec.group_length(k))
    if packed.zero is None:
        zero = torch.full_like(packed.scale, spec.middle_code, dtype=torch.float32)
    else:
        zero = packing.unpack_stream(packed.zero.t().contiguous(), spec.bits, n).t().float()
    column_scale = packed.scale.float().repeat_interleave(length, 1)[:, :k]
    column_zero = zero.repeat_interleave(length, 1)[:, :k]
    return (column_scale * (codes - column_zero)).to(dtype)


def activate(y: Tensor, activation: str) -> Tensor:
    """The epilogue of a gemm."""
    if activation == "relu":
        return y.relu()
    if activation == "gelu":
        return torch.nn.functional.gelu(y)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    if activation == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    if activation == "silu":
        return torch.nn.functional.silu(y)
    return y
