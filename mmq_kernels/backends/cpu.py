"""The CPU backend: the compiled kernels of `csrc/cpu`, with as many threads as torch uses."""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels import _native
from mmq_kernels.backends import (
    ACTIVATIONS,
    Backend,
    Call,
    PackedWeight,
    RuntimeShapes,
    RuntimeWeight,
    pages,
    transformed,
)
from mmq_kernels.backends.addresses import DTYPES, addresses, rows_in_memory
from mmq_kernels.backends.descent import Descended
from mmq_kernels.spec import QuantSpec, ceil_div

TILE_ROWS = 16
"""Rows of W that the layout interleaves; `kTileRows` of csrc/common/layout.h."""

UNIT_COLUMNS = 32
"""Columns whose codes share words; `kUnitColumns` of csrc/common/layout.h."""


class CpuBackend(Backend):
    """Layout "cpu": weight int32 ``[ceil(n/16), ceil(k/32) * bits, 16]``, zero past n and k.

    scale ``[ceil(n/16), groups, 16]``, zero ``[ceil(n/16), words of groups * 16 codes]``, both padded with zeros: the
    grids of a tile follow each other as its words do.
    """

    name = "cpu"
    layout = "cpu"
    activation_bits = (16, 8)

    def why_unavailable(self) -> str | None:
        return _native.why_missing()

    def why_not(self, call: Call) -> str | None:
        # A layer without data yet takes the layout of the backend it is made for.
        if call.device.type != "cpu" and not (call.op == "prepack" and call.device.type == "meta"):
            return f"device is {call.device.type}, not cpu"
        if call.layout not in (None, self.layout):
            return f"the weight has layout {call.layout!r}, not {self.layout!r}"
        return None

    def runtime_shapes(self, spec: QuantSpec, n: int, k: int) -> RuntimeShapes:
        groups, tiles = spec.groups(k), ceil_div(n, TILE_ROWS)
        words = ceil_div(k, UNIT_COLUMNS) * spec.bits
        return RuntimeShapes(
            (tiles, words, TILE_ROWS), (tiles, groups, TILE_ROWS), (tiles, spec.words(groups * TILE_ROWS))
        )

    def prepack(self, packed: PackedWeight, spec: QuantSpec, n: int, k: int) -> RuntimeWeight:
        shapes = self.runtime_shapes(spec, n, k)
        words = packed.words.contiguous()
        weight = pages.empty(shapes.weight, torch.int32)
        _native.module().prepack(*addresses(words, weight), spec.bits, n, k, torch.get_num_threads())
        scale = torch.zeros(shapes.scale[0], TILE_ROWS, shapes.scale[1], dtype=packed.scale.dtype)
        scale.flatten(0, 1)[:n] = packed.scale
        zero = None if packed.zero is None else _zeros_by_tile(packed.zero, spec.bits, shapes.zero)
        return RuntimeWeight(weight, scale.transpose(1, 2).contiguous(), zero)

    def unprepack(self, runtime: RuntimeWeight, spec: QuantSpec, n: int, k: int) -> PackedWeight:
        weight = runtime.weight.contiguous()
        words = torch.empty(n, spec.words(k), dtype=torch.int32)
        _native.module().unprepack(*addresses(weight, words), spec.bits, n, k, torch.get_num_threads())
        scale = runtime.scale.transpose(1, 2).flatten(0, 1)[:n].contiguous()
        zero = None if runtime.zero is None else _zeros_by_group(runtime.zero, spec.bits, spec.groups(k), n)
        return PackedWeight(words, scale, zero)

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
        isa: str = "",
    ) -> Tensor:
        return self._multiply(x, runtime, bias, spec, n, activation, perm, input_scale, 16, isa)

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
        isa: str = "",
    ) -> Tensor:
        return self._multiply(x, runtime, bias, spec, n, activation, perm, input_scale, 8, isa)

    def _multiply(
        self,
        x: Tensor,
        runtime: RuntimeWeight,
        bias: Tensor | None,
        spec: QuantSpec,
        n: int,
        activation: str,
        perm: Tensor | None,
        input_scale: Tensor | None,
        activation_bits: int,
        isa: str,
    ) -> Tensor:
        if perm is not None or input_scale is not None:
            x = transformed(x, perm, input_scale)
        if bias is not None and (bias.dtype is not x.dtype or not bias.is_contiguous()):
            bias = bias.detach().to(x.dtype).contiguous()
        weight, scale, zero = runtime
        y = torch.empty(len(x), n, dtype=x.dtype)
        numbers = _numbers(x, scale, spec, n, activation, activation_bits)
        _native.module().gemm(
            *addresses(x, weight, scale, zero, bias, y), *numbers, threads=torch.get_num_threads(), isa=isa
        )
        return y

    def native_product(
        self,
        x: Tensor,
        runtime: RuntimeWeight,
        bias: Tensor | None,
        spec: QuantSpec,
        n: int,
        activation: str,
        perm: Tensor | None,
        input_scale: Tensor | None,
        activation_bits: int,
    ) -> tuple[int, ...] | None:
        if perm is not None or input_scale is not None or (bias is not None and bias.dtype is not x.dtype):
            return None
        return _numbers(x, runtime.scale, spec, n, activation, activation_bits)

    def dequantize(
        self,
        runtime: RuntimeWeight,
        spec: QuantSpec,
        n: int,
        k: int,
        layout: str,
        dtype: torch.dtype,
        isa: str = "",
    ) -> Tensor:
        weight, scale, zero = runtime
        out = torch.empty(n, k, dtype=dtype)
        _native.module().dequantize(
            *addresses(weight, scale, zero, out),
            spec.bits,
            spec.group_size,
            n,
            k,
            DTYPES.index(dtype),
            DTYPES.index(scale.dtype),
            torch.get_num_threads(),
            isa,
        )
        return out

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        n, k = codes.shape
        words = torch.empty(n, QuantSpec(bits).words(k), dtype=torch.int32)
        _native.module().pack(*addresses(codes, words), bits, n, k, torch.get_num_threads())
        return words

    def unpack(self, words: Tensor, bits: int, k: int) -> Tensor:
        n = words.shape[0]
        codes = torch.empty(n, k, dtype=torch.uint8)
        _native.module().unpack(*addresses(words, codes), bits, n, k, torch.get_num_threads())
        return codes

    def quantize_rtn(
        self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, isa: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, k = weight.shape
        codes = torch.empty(n, k, dtype=torch.uint8)
        scale = torch.empty(n, spec.groups(k), dtype=torch.float32)
        zero = torch.empty(n, spec.groups(k), dtype=torch.uint8)
        _native.module().quantize_rtn(
            *addresses(weight, codes, scale, zero),
            spec.bits,
            spec.group_size,
            spec.symmetric,
            n,
            k,
            DTYPES.index(weight.dtype),
            DTYPES.index(scale_dtype),
            torch.get_num_threads(),
            isa,
        )
        return codes, scale.to(scale_dtype), zero

    def gptq_block(
        self,
        weight: Tensor,
        hinv: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
        isa: str = "",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, columns = weight.shape
        groups = spec.groups(columns)
        search = scale is None or zero is None
        if search:
            grid_scale, grid_zero = torch.empty(n, groups), torch.empty(n, groups, dtype=torch.uint8)
        else:
            assert scale is not None and zero is not None
            scale_dtype = scale.dtype
            grid_scale = scale.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            grid_zero = zero.clone(memory_format=torch.contiguous_format)
        weight, hinv = rows_in_memory(weight), rows_in_memory(hinv)
        codes, error = torch.empty(n, columns, dtype=torch.uint8), torch.empty(n, columns)
        _native.module().gptq_block(
            weight.data_ptr(),
            max(weight.stride(0), columns),
            hinv.data_ptr(),
            max(hinv.stride(0), columns),
            *addresses(codes, error, grid_scale, grid_zero),
            search,
            spec.bits,
            spec.group_size,
            spec.symmetric,
            n,
            columns,
            DTYPES.index(scale_dtype),
            torch.get_num_threads(),
            isa,
        )
        return codes, error, grid_scale.to(scale_dtype), grid_zero

    def search_grid(
        self, weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, isa: str = ""
    ) -> tuple[Tensor, Tensor]:
        n, columns = weight.shape
        scale, zero = torch.empty(n), torch.empty(n, dtype=torch.uint8)
        weight, importance = rows_in_memory(weight), importance.contiguous()
        _native.module().search_grid(
            weight.data_ptr(),
            max(weight.stride(0), columns),
            *addresses(importance, scale, zero),
            spec.bits,
            spec.symmetric,
            n,
            columns,
            DTYPES.index(scale_dtype),
            torch.get_num_threads(),
            isa,
        )
        return scale.to(scale_dtype), zero

    def descend(
        self,
        gradient: Tensor,
        hessian: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
        isa: str = "",
    ) -> Descended:
        n, columns = codes.shape
        gradient, hessian = rows_in_memory(gradient), rows_in_memory(hessian)
        after = [part.clone(memory_format=torch.contiguous_format) for part in (codes, scale, zero)]
        moved, gained = torch.empty(n, columns), torch.empty(n)
        _native.module().descend(
            gradient.data_ptr(),
            max(gradient.stride(0), columns),
            hessian.data_ptr(),
            max(hessian.stride(0), columns),
            *addresses(*after, moved, gained),
            spec.bits,
            spec.symmetric,
            n,
            columns,
            DTYPES.index(scale_dtype),
            torch.get_num_threads(),
            isa,
        )
        return Descended(after[0], after[1], after[2], moved, gained)


def _numbers(
    x: Tensor, scale: Tensor, spec: QuantSpec, n: int, activation: str, activation_bits: int
) -> tuple[int, ...]:
    """Of a product, in the order of `Product` in csrc/bindings.h; x ``[..., k]``."""
    k, dtypes = x.shape[-1], (DTYPES.index(x.dtype), DTYPES.index(scale.dtype))
    return (spec.bits, spec.group_size, x.numel() // k, n, k, *dtypes, ACTIVATIONS.index(activation), activation_bits)


def _zeros_by_tile(zero: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Zero points ``[words of n codes, groups]`` as `shape`: those of 16 rows are ``2 * bits`` whole bytes."""
    groups, tiles = zero.shape[1], shape[0]
    rows = torch.zeros(groups, ceil_div(tiles * TILE_ROWS * bits, 32), dtype=torch.int32)
    rows[:, : zero.shape[0]] = zero.t()
    of_tiles = rows.view(torch.uint8)[:, : tiles * 2 * bits].view(groups, tiles, 2 * bits)
    out = torch.zeros(shape, dtype=torch.int32)
    out.view(torch.uint8)[:, : groups * 2 * bits] = of_tiles.transpose(0, 1).flatten(1)
    return out


def _zeros_by_group(zero: Tensor, bits: int, groups: int, n: int) -> Tensor:
    """The inverse of `_zeros_by_tile`."""
    tiles = zero.shape[0]
    of_tiles = zero.contiguous().view(torch.uint8)[:, : groups * 2 * bits].view(tiles, groups, 2 * bits)
    rows = torch.zeros(groups, ceil_div(tiles * TILE_ROWS * bits, 32), dtype=torch.int32)
    rows.view(torch.uint8)[:, : tiles * 2 * bits] = of_tiles.transpose(0, 1).flatten(1)
    return rows[:, : ceil_div(n * bits, 32)].t().contiguous()
