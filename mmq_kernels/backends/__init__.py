"""Backends: who can compute the public ops, and the runtime layout each of them wants its weights in.

A backend is one class in one file or folder. Adding one is that file and one line in `_WHERE`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mmq_kernels.backends import descent
from mmq_kernels.spec import QuantSpec

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu")
"""Epilogues that every backend's gemm can fuse; `gelu` is the erf form, `quick_gelu` is x * sigmoid(1.702 x)."""

ACTIVATION_BITS = (16, 8)
"""What x is multiplied as: 16, as it is; 8, rounded to integers token by token (`integer.quantize_tokens`)."""

_WHERE = {
    "cuda": "mmq_kernels.backends.cuda:CudaBackend",
    "triton": "mmq_kernels.backends.triton:TritonBackend",
    "cpu": "mmq_kernels.backends.cpu:CpuBackend",
    "reference": "mmq_kernels.backends.reference:ReferenceBackend",
}

NAMES = tuple(_WHERE)
"""Backends; of two that cost the same the first is taken."""


class RuntimeWeight(NamedTuple):
    """The tensors of one weight in a backend's own layout; `zero` is None for symmetric weights.

    ``scale`` keeps its own dtype, ``zero`` holds int32 words of codes; how each is laid out is the backend's affair:
    `Backend.runtime_shapes` says it.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None


class RuntimeShapes(NamedTuple):
    """Shapes of the three tensors of a `RuntimeWeight`; `zero` is what it would be for an asymmetric weight."""

    weight: tuple[int, ...]
    scale: tuple[int, ...]
    zero: tuple[int, ...]


class PackedWeight(NamedTuple):
    """The on-disk tensors of one weight (DESIGN 4.1).

    ``words int32 [n, ceil(k*bits/32)]``, ``scale [n, groups]``, ``zero int32 [ceil(n*bits/32), groups]`` or None.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True)
class Call:
    """What is known of a call of an op before it runs; `layout`, `spec`, `m`, `n`, `k` as far as the op has them.

    `op` is the name of a public op, or "prepack"; `asked` the kernel that the user insists on.
    """

    op: str
    device: torch.device
    dtype: torch.dtype | None = None
    layout: str | None = None
    spec: QuantSpec | None = None
    m: int | None = None
    n: int | None = None
    k: int | None = None
    asked: str | None = None
    activation_bits: int = 16


class Backend(ABC):
    """One way to compute the ops. Shapes, dtypes and values are checked by `mmq_kernels.ops` before a call."""

    name: ClassVar[str]
    layout: ClassVar[str]
    """Name of the runtime layout that `prepack` makes."""
    kernels: ClassVar[tuple[str, ...]] = ()
    """Names of its ways to multiply, where it has several."""
    activation_bits: ClassVar[tuple[int, ...]] = (16,)
    """Of `ACTIVATION_BITS` those that it multiplies."""

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """Why this backend cannot be used on this machine, or None."""

    @abstractmethod
    def why_not(self, call: Call) -> str | None:
        """Why this backend cannot serve such a call, or None."""

    def why_not_kernel(self, call: Call, kernel: str) -> str | None:
        """Why one of `kernels` cannot serve a product that the backend serves, or None."""
        return None

    @abstractmethod
    def runtime_shapes(self, spec: QuantSpec, n: int, k: int) -> RuntimeShapes:
        """Shapes of what `prepack` makes."""

    @abstractmethod
    def prepack(self, packed: PackedWeight, spec: QuantSpec, n: int, k: int) -> RuntimeWeight:
        """On-disk tensors -> runtime layout, on the same device."""

    @abstractmethod
    def unprepack(self, runtime: RuntimeWeight, spec: QuantSpec, n: int, k: int) -> PackedWeight:
        """The exact inverse of `prepack`."""

    @abstractmethod
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
        """``activation((x [m, k] / input_scale)[:, perm] @ W[n, k]^T + bias [n])`` in x's dtype, accumulated in fp32.

        x is contiguous; `transformed` is what `perm` and `input_scale` mean; `kernel` is one of `self.kernels`.
        """

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
        """The same with x rounded to 8 bits; `mmq_kernels.backends.integer` has the equations."""
        raise NotImplementedError(f"{self.name} multiplies no activations of 8 bits")

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
        """Numbers from which the extension makes such a product by itself, x ``[..., k]``; None: it takes `gemm`."""
        return None

    @abstractmethod
    def dequantize(
        self, runtime: RuntimeWeight, spec: QuantSpec, n: int, k: int, layout: str, dtype: torch.dtype
    ) -> Tensor:
        """``scale * (q - zero)`` as ``[n, k]``, computed in fp32 and rounded once to `dtype`."""

    @abstractmethod
    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """Codes uint8 ``[n, k]`` -> dense stream int32 ``[n, ceil(k*bits/32)]``."""

    @abstractmethod
    def unpack(self, words: Tensor, bits: int, k: int) -> Tensor:
        """The inverse of `pack`."""

    @abstractmethod
    def quantize_rtn(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Weight ``[n, k]`` -> codes uint8 ``[n, k]``, scale ``[n, groups]``, zero uint8 ``[n, groups]``."""

    @abstractmethod
    def gptq_block(
        self,
        weight: Tensor,
        hinv: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One block of columns of GPTQ; see `mmq_kernels.ops.gptq_block`."""

    def gptq_blocks(
        self,
        weight: Tensor,
        hinv: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same for layers ``[layers, n, B]`` of one shape, one after another unless a backend knows better."""
        grids = [(None, None)] * len(weight) if scale is None or zero is None else list(zip(scale, zero, strict=True))
        done = [self.gptq_block(w, h, *g, spec, scale_dtype) for w, h, g in zip(weight, hinv, grids, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*done, strict=True))  # type: ignore[return-value]

    def search_grid(
        self, weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See `mmq_kernels.ops.descent`."""
        from mmq_kernels.backends.reference import range_grid

        return descent.search_grid(weight, importance, spec, scale_dtype, range_grid)

    def descend(
        self,
        gradient: Tensor,
        hessian: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
    ) -> descent.Descended:
        """See `mmq_kernels.ops.descent`."""
        return descent.descend(gradient, hessian, codes, scale, zero, spec, scale_dtype, self.gptq_block)


def transformed(x: Tensor, perm: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """``(x / input_scale)[:, perm]`` for x ``[m, k]``, the quotient rounded to x's dtype."""
    if input_scale is not None:
        x = x / input_scale.to(x.dtype)
    return x if perm is None else x.index_select(1, perm)


@cache
def backend(name: str) -> Backend:
    """The backend of that name, usable or not.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _WHERE:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    module, _, cls = _WHERE[name].partition(":")
    return getattr(import_module(module), cls)()


def backend_of_layout(layout: str) -> Backend:
    """The backend whose `prepack` makes this layout."""
    for name in NAMES:
        if backend(name).layout == layout:
            return backend(name)
    raise ValueError(f"layout must be one of {', '.join(backend(n).layout for n in NAMES)}, got {layout!r}")
