"""What a product found out, kept for the next one like it: that its arguments are right, and who serves it.

A model calls a layer again and again with the same tensors and shapes, and between two calls megabytes of weights pass
through the caches: what Python looks up then may have to come from memory. So the weight's tensor remembers the last
call that went well, and the extension compares the next with it, by identity (csrc/repeated.cpp); on a CPU it makes
the product then and there. `checks` remembers of a weight by itself that it is right, for calls that differ in x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mmq_kernels import _native
from mmq_kernels.backends import Backend, RuntimeWeight
from mmq_kernels.ops.choice import forced_in_context
from mmq_kernels.spec import QuantSpec

_LAST = "_mmq_last_call"
"""Attribute of a weight's tensor. Nothing in it leads back to the weight: that would be a cycle."""


class Found(NamedTuple):
    """What checks and choice led to."""

    spec: QuantSpec
    backend: Backend
    kernel: str


def last_call(weight: Tensor) -> Any:
    """The last call with this weight that went well, a `LastCall` of the extension, or None."""
    return weight.__dict__.get(_LAST) if type(weight) is Tensor else None  # while tracing there is nothing to keep


def keep(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    numbers: tuple[Any, ...],
    found: Found,
) -> None:
    """Remember a call, where there is the extension to compare it with others."""
    if type(weight) is not Tensor or not _native.available():
        return
    _, _, n, _, _, activation, _, activation_bits = numbers
    runtime = RuntimeWeight(weight, scale, zero)
    product = found.backend.native_product(
        x, runtime, bias, found.spec, n, activation, perm, input_scale, activation_bits
    )
    weight.__dict__[_LAST] = _native.module().LastCall(
        x, scale, zero, perm, input_scale, bias, numbers, forced_in_context, version, found, product
    )


def version(perm: Tensor) -> int | None:
    """Changes with each write to `perm`; None where that is not kept."""
    return None if perm.is_inference() else perm._version
