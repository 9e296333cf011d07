"""Packed 2..8-bit weights for vision-language models: kernels, quantizers and their evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmq_kernels._when_imported import when_imported
from mmq_kernels.nn import QuantLinear
from mmq_kernels.ops import use_backend
from mmq_kernels.spec import QuantSpec

if TYPE_CHECKING:
    from mmq_kernels.checkpoint import load, load_processor, quantize_checkpoint, quantize_model, save
    from mmq_kernels.plugin import MMQConfig

__version__ = "0.1.0"

__all__ = [
    "MMQConfig",
    "QuantLinear",
    "QuantSpec",
    "__version__",
    "explain",
    "load",
    "load_processor",
    "quantize_checkpoint",
    "quantize_model",
    "save",
    "use_backend",
]

_LAZY = {
    "MMQConfig": "mmq_kernels.plugin",
    "load": "mmq_kernels.checkpoint",
    "load_processor": "mmq_kernels.checkpoint",
    "quantize_checkpoint": "mmq_kernels.checkpoint",
    "quantize_model": "mmq_kernels.checkpoint",
    "save": "mmq_kernels.checkpoint",
}
"""What needs transformers is imported when it is first asked for."""


def explain(layer: QuantLinear, m: int | None = None) -> str:
    """Which backend, and which of its kernels for `m` tokens, serves a layer; and why it and no other."""
    from mmq_kernels.ops import select

    choice = select(
        "gemm",
        layer.device,
        spec=layer.spec,
        dtype=layer.dtype,
        layout=layer.layout,
        m=m,
        n=layer.out_features,
        k=layer.in_features,
        forced=layer.pinned or None,
        activation_bits=layer.activation_bits,
    )
    return str(choice)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


when_imported("transformers.quantizers.auto", "mmq_kernels.plugin")
