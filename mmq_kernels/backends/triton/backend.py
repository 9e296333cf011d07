"""`TritonBackend`: checks what Triton can do here, picks configurations, launches the kernels of this folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from mmq_kernels.backends import Call, RuntimeWeight, transformed
from mmq_kernels.backends.addresses import rows_in_memory
from mmq_kernels.backends.blocks import gptq_wide
from mmq_kernels.backends.dense import dense_gemm
from mmq_kernels.backends.planes import PlanesBackend
from mmq_kernels.backends.triton.configs import Config, token_tile, weight_scales
from mmq_kernels.backends.workspace import Counters
from mmq_kernels.spec import QuantSpec, ceil_div

GATHERED_TOKENS = 64
"""Up to so many tokens the kernel permutes and scales x itself; more are prepared by torch first."""

DEQUANTIZED = (256, 64)
"""Rows and columns of a program of dequantize: each thread then reads and writes 16 bytes at a time."""

GPTQ_COLUMNS = 128
"""Columns that one launch of gptq_block holds in registers."""

GPUS = ("cuda", "xpu")
"""Kinds of torch devices that Triton compiles for ("cuda" is AMD's too)."""

LEAST_CAPABILITY = (7, 5)

MOST_WORDS = 2**31 - 1
"""Places of words are 32-bit numbers in the kernels; those of x and y are not."""


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(PlanesBackend):
    """Layout "planes", read in place. Kernels "packed" (decodes inside the product) and "dense" (dequantizes first)."""

    name = "triton"
    kernels = ("packed", "dense")

    def __init__(self) -> None:
        self._counters = Counters()

    # --- what this backend can do -----------------------------------------------------------------------------------

    def why_unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if interpreted() or any(_present(kind) for kind in GPUS):
            return None
        return f"torch sees no device of {' or '.join(GPUS)}, and TRITON_INTERPRET is not 1"

    def why_not(self, call: Call) -> str | None:
        kind = call.device.type
        if interpreted():
            # A layer without data yet takes the layout of the backend it is made for.
            if kind != "cpu" and not (call.op == "prepack" and kind == "meta"):
                return f"device is {kind}, and TRITON_INTERPRET=1 runs on cpu"
        elif kind not in GPUS:
            return f"device is {kind}, not {' or '.join(GPUS)}"
        elif kind == "cuda" and not torch.version.hip:
            capability = torch.cuda.get_device_capability(call.device)
            have = ".".join(map(str, capability))
            if capability < LEAST_CAPABILITY:
                return f"compute capability is {have}, below 7.5"
            if call.dtype == torch.bfloat16 and capability < (8, 0):
                return f"compute capability is {have}, below 8.0, which bfloat16 needs"
        if call.layout not in (None, self.layout):
            return f"the weight has layout {call.layout!r}, not {self.layout!r}"
        if call.spec is not None and call.n is not None and call.k is not None:
            words = call.spec.plane_words(call.k) * call.n
            if words > MOST_WORDS:
                return f"the weight has {words} words, more than the {MOST_WORDS} that the kernels can count"
        return None

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
        m = x.shape[0]
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

        def launch(config: Config) -> None:
            self._launch_gemm(x, runtime, perm, input_scale, bias, y, spec, activation, config)

        launch(self.config(x, runtime, spec, n, launch))
        return y

    def config(
        self, x: Tensor, runtime: RuntimeWeight, spec: QuantSpec, n: int, launch: Callable[[Config], None]
    ) -> Config:
        """The configuration of a product: the table's, or what tuning has found or finds now."""
        from mmq_kernels.backends.triton import tuning

        machine = _machine(x.device)
        m, k = x.shape
        key = f"{spec}:{x.dtype}:{runtime.scale.dtype}:m{token_tile(m)}:n{n}:k{k}".replace("torch.", "")
        measure = None if machine.arch == "interpreter" or _capturing(x.device) else _measured(launch)
        return tuning.choose(machine.arch, m, key, machine.findings, measure)

    def _launch_gemm(
        self,
        x: Tensor,
        runtime: RuntimeWeight,
        perm: Tensor | None,
        input_scale: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        spec: QuantSpec,
        activation: str,
        config: Config,
    ) -> None:
        from mmq_kernels.backends.triton.gemm import gemm

        (m, k), n = x.shape, y.shape[1]
        config, scales = config.fitted(spec, k, runtime.scale.dtype == torch.float32)
        splits = config.splits(m, n, k, _machine(x.device).multiprocessors)
        tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
        partials = counters = None
        if splits > 1:
            partials = torch.empty(tiles * splits * config.block_n * config.block_m, device=x.device)
            counters = self._take_counters(tiles, x.device)
        with _on(x.device):
            gemm[(tiles * splits,)](
                x,
                runtime.weight,
                runtime.scale,
                runtime.zero,
                perm,
                input_scale,
                bias,
                y,
                partials,
                counters,
                m,
                n,
                k,
                spec.group_length(k),
                spec.words(n),
                splits,
                spec.bits,
                *_planes(spec),
                scales,
                activation,
                config.block_m,
                config.block_n,
                config.block_k,
                num_warps=config.warps,
                num_stages=config.stages,
                enable_fp_fusion=True,
            )

    def _take_counters(self, count: int, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        return self._counters.take(count, device, stream, _capturing(device))

    def dequantize(
        self, runtime: RuntimeWeight, spec: QuantSpec, n: int, k: int, layout: str, dtype: torch.dtype
    ) -> Tensor:
        from mmq_kernels.backends.triton.dequantize import dequantize

        block_n, block_k = DEQUANTIZED
        out = torch.empty(n, k, dtype=dtype, device=runtime.weight.device)
        with _on(out.device):
            dequantize[(ceil_div(n, block_n) * ceil_div(k, block_k),)](
                *runtime,
                out,
                n,
                k,
                spec.group_length(k),
                spec.words(n),
                spec.bits,
                *_planes(spec),
                weight_scales(spec, k, block_k),
                block_n,
                block_k,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return out

    # --- quantizers -------------------------------------------------------------------------------------------------

    def quantize_rtn(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        from mmq_kernels.backends.triton.quantizers import quantize_rtn

        n, k = weight.shape
        groups = spec.groups(k)
        codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(n, groups, dtype=scale_dtype, device=weight.device)
        zero = torch.empty(n, groups, dtype=torch.uint8, device=weight.device)
        rows = 16
        with _on(weight.device):
            quantize_rtn[(ceil_div(n, rows) * groups,)](
                weight,
                codes,
                scale,
                zero,
                n,
                k,
                spec.group_length(k),
                groups,
                spec.bits,
                spec.symmetric,
                rows,
                128,
                enable_fp_fusion=False,
            )
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
        from mmq_kernels.backends.triton.quantizers import gptq_block

        layers, n, columns = weight.shape
        if columns > GPTQ_COLUMNS:
            return gptq_wide(self, weight, hinv, scale, zero, spec, scale_dtype, GPTQ_COLUMNS)
        shape = (layers, n, spec.groups(columns))
        search = scale is None or zero is None
        if scale is None or zero is None:
            scale = torch.empty(shape, dtype=scale_dtype, device=weight.device)
            zero = torch.empty(shape, dtype=torch.uint8, device=weight.device)
        else:
            scale = scale.clone(memory_format=torch.contiguous_format)
            zero = zero.clone(memory_format=torch.contiguous_format)
        weight, hinv = rows_in_memory(weight), rows_in_memory(hinv)
        codes = torch.empty(layers, n, columns, dtype=torch.uint8, device=weight.device)
        error = torch.empty(layers, n, columns, device=weight.device)
        rows = 8
        with _on(weight.device):
            gptq_block[(ceil_div(n, rows), layers)](
                weight,
                hinv,
                codes,
                error,
                scale,
                zero,
                n,
                columns,
                max(1, spec.group_length(columns)),
                spec.groups(columns),
                *weight.stride()[:2],
                *hinv.stride()[:2],
                spec.bits,
                spec.symmetric,
                search,
                rows,
                max(16, 1 << (columns - 1).bit_length()),
                enable_fp_fusion=False,
            )
        return codes, error, scale, zero


class _Machine:
    """What launches need to know of a device."""

    def __init__(self, device: torch.device) -> None:
        self.arch, self.name, self.multiprocessors = "interpreter", "interpreter", 4
        if device.type != "cpu":
            properties = getattr(torch, device.type).get_device_properties(device)
            self.name = properties.name
            if device.type == "xpu":
                self.arch = "xpu"
                self.multiprocessors = properties.max_compute_units // 8  # units of 8 vector engines
            else:
                self.multiprocessors = properties.multi_processor_count
                major, minor = properties.major, properties.minor
                self.arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{major}{minor}"

    @cached_property
    def findings(self) -> Any:
        import triton

        from mmq_kernels.backends.triton.tuning import Findings, cache_file

        return Findings(cache_file(self.name, triton.__version__))


@cache
def _machine(device: torch.device) -> _Machine:
    return _Machine(device)


def _present(kind: str) -> bool:
    module = getattr(torch, kind, None)
    return module is not None and module.is_available()


def _planes(spec: QuantSpec) -> tuple[int, int, int]:
    """Widths of the planes, 0 for those that are not there."""
    return (*spec.planes, 0, 0)[:3]  # type: ignore[return-value]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its tensors are on."""
    if device.type == "cpu" or device.index == getattr(torch, device.type).current_device():
        return nullcontext()
    return getattr(torch, device.type).device(device)


def _measured(launch: Callable[[Config], None]) -> Callable[[Config], float]:
    """Seconds of a launch; RuntimeError for a configuration that this GPU cannot run."""

    def measure(config: Config) -> float:
        from triton.errors import TritonError
        from triton.testing import do_bench

        try:
            return do_bench(lambda: launch(config), warmup=5, rep=20, return_mode="median") / 1e3
        except TritonError as error:
            raise RuntimeError(str(error)) from error

    return measure
