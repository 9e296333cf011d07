"""Compiles the Triton kernels ahead of time, for GPUs that are not here, as a launch there would."""

from __future__ import annotations

from typing import Any

from mmq_kernels.backends.triton.backend import DEQUANTIZED, _planes
from mmq_kernels.backends.triton.configs import Config, weight_scales
from mmq_kernels.spec import QuantSpec

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
FUSED = {"enable_fp_fusion": True}
SHAPE = {"m": "i32", "n": "i32", "k": "i32", "length": "i32", "zero_words": "i32", "splits": "i32"}


def compiled(kernel: Any, target: str, values: dict[str, Any], options: dict[str, Any]) -> Any:
    """A kernel for a target.

    Args:
        values: by parameter: a type ("*fp16", "i32"), where it is given at run time, or what is known when compiling.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: value for name, value in values.items() if isinstance(value, str) and value[0] in "*iu"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: values[name] for name in kernel.arg_names if name not in types}
    # As a launch would find: pointers from torch and sizes of real layers are multiples of 16; m and splits are not.
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in kernel.arg_names
        if name in types and name not in ("m", "splits", "columns", "groups")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def compiled_gemm(
    target: str,
    spec: QuantSpec,
    config: Config,
    dtype: str = "fp16",
    scale: str = "fp16",
    k: int = 4096,
    activation: str = "none",
    split: bool = False,
    gathered: bool = False,
) -> Any:
    from mmq_kernels.backends.triton.gemm import gemm

    config, scales = config.fitted(spec, k, scale == "fp32")
    values = {
        "x": f"*{dtype}",
        "weight": "*i32",
        "scale": f"*{scale}",
        "zero": None if spec.symmetric else "*i32",
        "perm": "*i32" if gathered else None,
        "input_scale": f"*{dtype}" if gathered else None,
        "bias": f"*{dtype}",
        "y": f"*{dtype}",
        "partials": "*fp32" if split else None,
        "counters": "*i32" if split else None,
        **SHAPE,
        "BITS": spec.bits,
        **dict(zip(("W0", "W1", "W2"), _planes(spec), strict=True)),
        "SCALES": scales,
        "ACTIVATION": activation,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    return compiled(gemm, target, values, {"num_warps": config.warps, "num_stages": config.stages, **FUSED})


def compiled_dequantize(target: str, spec: QuantSpec, dtype: str = "fp16", k: int = 4096) -> Any:
    from mmq_kernels.backends.triton.dequantize import dequantize

    block_n, block_k = DEQUANTIZED
    values = {
        "weight": "*i32",
        "scale": "*fp16",
        "zero": None if spec.symmetric else "*i32",
        "out": f"*{dtype}",
        **SHAPE,
        "BITS": spec.bits,
        **dict(zip(("W0", "W1", "W2"), _planes(spec), strict=True)),
        "SCALES": weight_scales(spec, k, block_k),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }
    return compiled(dequantize, target, values, {"num_warps": 4, **FUSED})


def compiled_rtn(target: str, spec: QuantSpec, dtype: str = "fp16") -> Any:
    from mmq_kernels.backends.triton.quantizers import quantize_rtn

    values = {
        "weight": f"*{dtype}",
        "codes": "*u8",
        "scale": "*fp16",
        "zero": "*u8",
        **SHAPE,
        "groups": "i32",
        "BITS": spec.bits,
        "SYMMETRIC": spec.symmetric,
        "ROWS": 16,
        "BLOCK": 128,
    }
    return compiled(quantize_rtn, target, values, {"enable_fp_fusion": False})


def compiled_gptq(target: str, spec: QuantSpec, search: bool = True) -> Any:
    from mmq_kernels.backends.triton.quantizers import gptq_block

    strides = dict.fromkeys(("columns", "groups", "weight_layer", "weight_row", "hinv_layer", "hinv_row"), "i32")
    values = {
        "weight": "*fp32",
        "hinv": "*fp32",
        "codes": "*u8",
        "error": "*fp32",
        "scale": "*fp16",
        "zero": "*u8",
        **SHAPE,
        **strides,
        "BITS": spec.bits,
        "SYMMETRIC": spec.symmetric,
        "SEARCH": search,
        "ROWS": 8,
        "BLOCK": 128,
    }
    return compiled(gptq_block, target, values, {"enable_fp_fusion": False})
