"""Packed layers to measure: of random codes, copies of one, and in the place of a module's linears."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from mmq_kernels import ops
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec


def random_layer(
    n: int,
    k: int,
    spec: QuantSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    activation: str = "none",
) -> QuantLinear:
    """``W [n, k]`` of random codes, scales around 0.01 and, where asymmetric, random zero points."""
    groups = spec.groups(k)
    codes = torch.randint(0, spec.max_code + 1, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, groups).half() * 0.01
    zero = None if spec.symmetric else torch.randint(0, spec.max_code + 1, (n, groups), dtype=torch.uint8)
    added = torch.randn(n).to(dtype) if bias else None
    layer = QuantLinear.from_codes(codes, scale, zero, spec, bias=added, activation=activation, dtype=dtype)
    return layer.to(device)


def pinned(layer: QuantLinear, backend: str) -> QuantLinear:
    """A copy of a layer that a backend, or one kernel of it ("cuda/dense"), serves.

    Raises:
        RuntimeError: where it cannot.
    """
    copy = deepcopy(layer)
    copy.backend = backend
    return copy


def twin(layer: QuantLinear) -> QuantLinear:
    """The same layer in memory of its own, packed as one that is loaded: in which pages its words lie counts."""
    tensors = layer.on_disk() if layer.bias is None else {**layer.on_disk(), "bias": layer.bias.detach().clone()}
    copy = QuantLinear.from_tensors(tensors, layer.spec, activation=layer.activation, dtype=layer.dtype)
    copy.backend = layer.pinned
    copy.activation_bits = layer.activation_bits
    return copy.prepack()


def rounded(linear: nn.Linear, spec: QuantSpec) -> QuantLinear:
    """A linear's weight rounded to nearest and packed, on its device."""
    codes, scale, zero = ops.quantize_rtn(linear.weight.detach(), spec)
    bias = None if linear.bias is None else linear.bias.detach()
    return QuantLinear.from_codes(codes, scale, zero, spec, bias=bias, dtype=linear.weight.dtype)


def replace_linears(
    module: nn.Module, replacement: Callable[[str, nn.Linear], nn.Module], *, left_alone: tuple[str, ...] = ()
) -> int:
    """Put `replacement(name, linear)` in the place of every linear, in place; returns how many.

    Args:
        left_alone: last parts of the names of linears to keep.
    """
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    chosen = [(name, linear) for name, linear in found if name.rpartition(".")[2] not in left_alone]
    for name, linear in chosen:
        module.set_submodule(name, replacement(name, linear))
    return len(chosen)


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, a tied one counted once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
