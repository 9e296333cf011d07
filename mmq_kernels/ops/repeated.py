"""What a product found out, kept for the next one like it: that its arguments are right, and who serves it.

A model calls a layer again and again with the same tensors and shapes, and between two calls megabytes of weights pass
through the caches: what Python looks up then may have to come from memory. So the weight's tensor remembers the last
call that went well. `checks` remembers of a weight by itself that it is right, for calls that differ in x.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmq_kernels.ops.choice import Choice, forced_backend
from mmq_kernels.spec import QuantSpec

_LAST = "_mmq_last_call"
"""Attribute of a weight's tensor. Nothing in it leads back to the weight: that would be a cycle."""


class Found(NamedTuple):
    """What a call that went well was found to be; `tensors` only so that no other gets the identity of one of them."""

    call: tuple[object, ...]
    spec: QuantSpec
    choice: Choice
    tensors: tuple[Tensor | None, ...]


def call_of(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    numbers: tuple[object, ...],
) -> tuple[object, ...]:
    """All that checks and choice depend on, but the weight itself. Tensors count by their identity."""
    tensors = (id(scale), id(zero), id(perm), id(input_scale), id(bias))
    call: tuple[object, ...] = (*tensors, x.shape, x.dtype, x.device, forced_backend(), *numbers)
    if perm is not None:
        call += (version(perm),)
    for vector in (input_scale, bias):  # `.to()` changes a parameter in its place
        if vector is not None:
            call += (vector.shape, vector.dtype, vector.device)
    return call


def found(weight: Tensor, call: tuple[object, ...]) -> Found | None:
    """What was found last, where that call was like this one."""
    last = weight.__dict__.get(_LAST) if type(weight) is Tensor else None  # while tracing there is nothing to keep
    return last if last is not None and last.call == call else None


def keep(weight: Tensor, last: Found) -> None:
    """Remember it."""
    if type(weight) is Tensor:
        weight.__dict__[_LAST] = last


def version(perm: Tensor) -> int | None:
    """Changes with each write to `perm`; None where that is not kept."""
    return None if perm.is_inference() else perm._version
