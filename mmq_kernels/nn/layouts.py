"""From a weight's on-disk tensors to the runtime layout that a backend wants, and back; also where there is no data.

A tensor on the meta device, or one that a tracer stands in for, has a shape and nothing else: kernels must not see it,
and only its shape is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from mmq_kernels import backends, ops
from mmq_kernels.backends import PackedWeight, RuntimeWeight
from mmq_kernels.ops.choice import select
from mmq_kernels.spec import QuantSpec


def layout_for(device: torch.device, spec: QuantSpec, k: int, pinned: str = "") -> str:
    """The layout of the backend chosen for a device, or of the one the layer is pinned to.

    Raises:
        ValueError: for an unknown `pinned`.
        RuntimeError: for one that cannot be used on `device`; any can where there is no data to serve.
    """
    if pinned and device.type == "meta":
        return backends.backend(pinned.partition("/")[0]).layout
    return backends.backend(select("prepack", device, spec=spec, k=k, forced=pinned or None).backend).layout


def runtime_of(packed: PackedWeight, layout: str, spec: QuantSpec, n: int, k: int) -> RuntimeWeight:
    """On-disk tensors, columns in stored order -> runtime layout."""
    if _without_data(packed.words):
        return blank(packed, layout, spec, n, k, packed.words.device)
    return backends.backend_of_layout(layout).prepack(packed, spec, n, k)


def packed_of(runtime: RuntimeWeight, layout: str, spec: QuantSpec, n: int, k: int) -> PackedWeight:
    """The inverse."""
    if _without_data(runtime.weight):
        groups = spec.groups(k)
        shapes = ((n, spec.words(k)), (n, groups), (spec.words(n), groups))
        return PackedWeight(*_empty(runtime, shapes, runtime.weight.device))  # type: ignore[arg-type]
    return backends.backend_of_layout(layout).unprepack(runtime, spec, n, k)


def blank(
    like: PackedWeight | RuntimeWeight, layout: str, spec: QuantSpec, n: int, k: int, device: torch.device
) -> RuntimeWeight:
    """Uninitialized runtime tensors with the dtypes of `like`."""
    shapes = backends.backend_of_layout(layout).runtime_shapes(spec, n, k)
    return RuntimeWeight(*_empty(like, shapes, device))  # type: ignore[arg-type]


def reordered(words: Tensor, columns: Tensor, spec: QuantSpec, k: int) -> Tensor:
    """Words of the same codes with their columns taken in another order."""
    codes = ops.unpack(words, spec.bits, k)
    return ops.pack(codes[:, columns.long()].contiguous(), spec.bits)


def moved(tensor: Tensor | None, fn: Callable[[Tensor], Tensor]) -> Tensor | None:
    """`fn` applied, but for a change of dtype."""
    if tensor is None:
        return None
    there = fn(tensor)
    return there if there.dtype == tensor.dtype else tensor.to(there.device)


def _without_data(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _empty(
    like: PackedWeight | RuntimeWeight, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> list[Tensor | None]:
    return [
        None if tensor is None else torch.empty(shape, dtype=tensor.dtype, device=device)
        for tensor, shape in zip(like, shapes, strict=True)
    ]
