"""The CUDA backend: the compiled kernels of `csrc/cuda`, on the tensors' device and the current stream."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmq_kernels import _native, packing
from mmq_kernels.backends import (
    ACTIVATIONS,
    Backend,
    Call,
    PackedWeight,
    RuntimeShapes,
    RuntimeWeight,
    transformed,
)
from mmq_kernels.backends.addresses import DTYPES, addresses, rows_in_memory
from mmq_kernels.backends.blocks import gptq_wide
from mmq_kernels.backends.dense import dense_gemm
from mmq_kernels.backends.descent import Descended
from mmq_kernels.backends.workspace import Counters
from mmq_kernels.spec import PER_CHANNEL, QuantSpec, ceil_div

TILE = 64
"""Rows and columns of a tile of the layout; `kTileSide` of csrc/cuda/layout.cuh."""

GROUP_MULTIPLE = 16
"""Groups begin where the 16 columns of a tensor-core step do."""

GATHERED_TOKENS = 64
"""Up to so many tokens the kernel permutes and scales x itself; more are prepared by torch first."""

HALVES = (torch.float16, torch.bfloat16)


class CudaBackend(Backend):
    """Layout "cuda": weight int32 ``[ceil(n/64), ceil(k/64), bits, 128]``, tiles in tensor-core fragment order.

    scale ``[groups, 64 * ceil(n/64)]`` and zero ``[groups, words]``, both in the order of csrc/cuda/layout.cuh.
    """

    name = "cuda"
    layout = "cuda"
    kernels = ("packed", "dense")

    def __init__(self) -> None:
        self._counters = Counters()

    # --- what this backend can do -----------------------------------------------------------------------------------

    def why_unavailable(self) -> str | None:
        if not _native.available():
            return _native.why_missing()
        if not hasattr(_native.module(), "cuda"):
            return "the extension was built without CUDA"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return "torch is built for ROCm" if torch.version.hip else None

    def why_not(self, call: Call) -> str | None:
        if call.device.type != "cuda":
            return f"device is {call.device.type}, not cuda"
        major, minor = torch.cuda.get_device_capability(call.device)
        if major < 8:
            return f"compute capability is {major}.{minor}, below 8.0"
        return self.why_not_weight(call)

    def why_not_weight(self, call: Call) -> str | None:
        """The part of `why_not` that does not depend on the machine."""
        if call.layout not in (None, self.layout):
            return f"the weight has layout {call.layout!r}, not {self.layout!r}"
        if call.spec is not None and call.op in ("prepack", "gemm", "dequantize"):
            size = call.spec.group_size
            whole = size == PER_CHANNEL or (call.k is not None and size >= call.k)
            if not whole and size % GROUP_MULTIPLE:
                return f"group_size is {size}, not a multiple of {GROUP_MULTIPLE}"
        return None

    def why_not_kernel(self, call: Call, kernel: str) -> str | None:
        """ "packed" decodes inside the product; "dense" dequantizes first, and multiplies as the vendor does."""
        if kernel == "packed" and call.dtype not in (None, *HALVES):
            return f"{call.dtype} has no packed kernel"
        return None

    # --- layouts ----------------------------------------------------------------------------------------------------

    def runtime_shapes(self, spec: QuantSpec, n: int, k: int) -> RuntimeShapes:
        groups, tiles = spec.groups(k), ceil_div(n, TILE)
        return RuntimeShapes(
            (tiles, ceil_div(k, TILE), spec.bits, 2 * TILE), (groups, TILE * tiles), (groups, 2 * spec.bits * tiles)
        )

    def prepack(self, packed: PackedWeight, spec: QuantSpec, n: int, k: int) -> RuntimeWeight:
        words = packed.words.contiguous()
        weight = torch.empty(self.runtime_shapes(spec, n, k).weight, dtype=torch.int32, device=words.device)
        self._native().prepack(*addresses(words, weight), spec.bits, n, k, *self._target(words.device))
        zero = None
        if packed.zero is not None:
            zeros = packing.unpack_stream(packed.zero.t().contiguous(), spec.bits, n)
            zero = packing.pack_stream(_to_scale_order(zeros), spec.bits)
        return RuntimeWeight(weight, _to_scale_order(packed.scale.t()), zero)

    def unprepack(self, runtime: RuntimeWeight, spec: QuantSpec, n: int, k: int) -> PackedWeight:
        weight = runtime.weight.contiguous()
        words = torch.empty(n, spec.words(k), dtype=torch.int32, device=weight.device)
        self._native().unprepack(*addresses(weight, words), spec.bits, n, k, *self._target(words.device))
        zero = None
        if runtime.zero is not None:
            zeros = packing.unpack_stream(runtime.zero, spec.bits, ceil_div(n, TILE) * TILE)
            zero = packing.pack_stream(_from_scale_order(zeros, n), spec.bits).t().contiguous()
        return PackedWeight(words, _from_scale_order(runtime.scale, n).t().contiguous(), zero)

    # --- products ---------------------------------------------------------------------------------------------------

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
        kernel: str = "packed",
    ) -> Tensor:
        m, k = x.shape
        if kernel == "dense":
            return dense_gemm(self, transformed(x, perm, input_scale), runtime, bias, spec, n, activation)
        if m > GATHERED_TOKENS:
            x, perm, input_scale = transformed(x, perm, input_scale), None, None
        if bias is not None:
            bias = bias.detach().to(x.dtype).contiguous()
        if input_scale is not None:
            input_scale = input_scale.to(x.dtype).contiguous()
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        if m == 0:
            return y
        scale_dtype = DTYPES.index(runtime.scale.dtype)
        partials, counters = self._workspace(spec, m, n, k, scale_dtype, x.device)
        self._native().gemm(
            *addresses(x, *runtime, perm, input_scale, bias, y, partials, counters),
            spec.bits,
            spec.group_size,
            m,
            n,
            k,
            DTYPES.index(x.dtype),
            scale_dtype,
            ACTIVATIONS.index(activation),
            *self._target(x.device),
        )
        return y

    def _workspace(
        self, spec: QuantSpec, m: int, n: int, k: int, scale_dtype: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Places for the partial sums of blocks that share a tile, and their counters."""
        floats, count = self._workspace_size(spec, m, n, k, scale_dtype, device.index or 0)
        if count == 0:
            return None, None
        return torch.empty(floats, dtype=torch.float32, device=device), self._take_counters(count, device)

    @lru_cache(maxsize=2**16)  # noqa: B019  # backends live as long as the process
    def _workspace_size(
        self, spec: QuantSpec, m: int, n: int, k: int, scale_dtype: int, device: int
    ) -> tuple[int, int]:
        plan = self._native().gemm_plan(spec.bits, spec.group_size, m, n, k, scale_dtype, device)
        return plan["partial_floats"], plan["counters"]

    def dequantize(
        self, runtime: RuntimeWeight, spec: QuantSpec, n: int, k: int, layout: str, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(n, k, dtype=dtype, device=runtime.weight.device)
        self._native().dequantize(
            *addresses(*runtime, out),
            spec.bits,
            spec.group_size,
            n,
            k,
            DTYPES.index(dtype),
            DTYPES.index(runtime.scale.dtype),
            *self._target(out.device),
        )
        return out

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        n, k = codes.shape
        words = torch.empty(n, QuantSpec(bits).words(k), dtype=torch.int32, device=codes.device)
        self._native().pack(*addresses(codes, words), bits, n, k, *self._target(codes.device))
        return words

    def unpack(self, words: Tensor, bits: int, k: int) -> Tensor:
        codes = torch.empty(words.shape[0], k, dtype=torch.uint8, device=words.device)
        self._native().unpack(*addresses(words, codes), bits, words.shape[0], k, *self._target(words.device))
        return codes

    # --- quantizers -------------------------------------------------------------------------------------------------

    def quantize_rtn(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        n, k = weight.shape
        codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(n, spec.groups(k), dtype=torch.float32, device=weight.device)
        zero = torch.empty(n, spec.groups(k), dtype=torch.uint8, device=weight.device)
        self._native().quantize_rtn(
            *addresses(weight, codes, scale, zero),
            spec.bits,
            spec.group_size,
            spec.symmetric,
            n,
            k,
            DTYPES.index(weight.dtype),
            DTYPES.index(scale_dtype),
            *self._target(weight.device),
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, zero = (None if grid is None else grid[None] for grid in (scale, zero))
        done = self.gptq_blocks(weight[None], hinv[None], scale, zero, spec, scale_dtype)
        return tuple(part[0] for part in done)  # type: ignore[return-value]

    def gptq_blocks(
        self,
        weight: Tensor,
        hinv: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        most = self._native().gptq_columns
        if weight.shape[-1] > most:
            return gptq_wide(self, weight, hinv, scale, zero, spec, scale_dtype, most)
        layers, n, columns = weight.shape
        shape = (layers, n, spec.groups(columns))
        search = scale is None or zero is None
        if scale is None or zero is None:
            grid_scale = torch.empty(shape, device=weight.device)
            grid_zero = torch.empty(shape, dtype=torch.uint8, device=weight.device)
        else:
            scale_dtype = scale.dtype
            grid_scale = scale.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            grid_zero = zero.clone(memory_format=torch.contiguous_format)
        weight, hinv = rows_in_memory(weight), rows_in_memory(hinv)
        codes = torch.empty(layers, n, columns, dtype=torch.uint8, device=weight.device)
        error = torch.empty(layers, n, columns, device=weight.device)
        self._native().gptq_block(
            weight.data_ptr(),
            weight.stride(0),
            max(weight.stride(1), columns),
            hinv.data_ptr(),
            hinv.stride(0),
            max(hinv.stride(1), columns),
            *addresses(codes, error, grid_scale, grid_zero),
            search,
            spec.bits,
            spec.group_size,
            spec.symmetric,
            layers,
            n,
            columns,
            DTYPES.index(scale_dtype),
            *self._target(weight.device),
        )
        return codes, error, grid_scale.to(scale_dtype), grid_zero

    def search_grid(
        self, weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        n, columns = weight.shape
        scale = torch.empty(n, device=weight.device)
        zero = torch.empty(n, dtype=torch.uint8, device=weight.device)
        weight, importance = rows_in_memory(weight), importance.contiguous()
        self._native().search_grid(
            weight.data_ptr(),
            max(weight.stride(0), columns),
            *addresses(importance, scale, zero),
            spec.bits,
            spec.symmetric,
            n,
            columns,
            DTYPES.index(scale_dtype),
            *self._target(weight.device),
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
    ) -> Descended:
        """Of groups of more columns than a block has registers for, the codes' step alone is a kernel: `gptq_block`."""
        n, columns = codes.shape
        if columns > self._native().gptq_columns:
            return super().descend(gradient, hessian, codes, scale, zero, spec, scale_dtype)
        gradient, hessian = rows_in_memory(gradient), rows_in_memory(hessian)
        after = [part.clone(memory_format=torch.contiguous_format) for part in (codes, scale, zero)]
        moved, gained = torch.empty(n, columns, device=codes.device), torch.empty(n, device=codes.device)
        self._native().descend(
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
            *self._target(codes.device),
        )
        return Descended(after[0], after[1], after[2], moved, gained)

    # --- the machine; the emulation of the tests has its own --------------------------------------------------------

    def _native(self) -> Any:
        return _native.module().cuda

    def _target(self, device: torch.device) -> tuple[int, int]:
        """Device index and handle of its current stream."""
        return device.index, torch._C._cuda_getCurrentRawStream(device.index)

    def _take_counters(self, count: int, device: torch.device) -> Tensor:
        capturing = torch.cuda.is_current_stream_capturing()
        return self._counters.take(count, device, self._target(device)[1], capturing)


def _to_scale_order(rows: Tensor) -> Tensor:
    """``[groups, n]`` -> ``[groups, 64 * ceil(n/64)]``: row ``g + 8i`` of each 64 at place ``8g + i``; 0 past n."""
    groups, n = rows.shape
    padded = torch.nn.functional.pad(rows, (0, -n % TILE))
    return padded.view(groups, -1, 8, 8).transpose(2, 3).reshape(groups, -1).contiguous()


def _from_scale_order(rows: Tensor, n: int) -> Tensor:
    """The inverse of `_to_scale_order`."""
    groups = rows.shape[0]
    return rows.view(groups, -1, 8, 8).transpose(2, 3).reshape(groups, -1)[:, :n].contiguous()
