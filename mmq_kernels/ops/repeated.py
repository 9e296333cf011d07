"""What a product found out, kept for the next one like it: that its arguments are right, and who serves it.

A model calls a layer again and again with the same tensors and shapes, and between two calls megabytes of weights pass
through the caches: what Python looks up then may have to come from memory. So the weight's tensor remembers the last
call that went well, and the next is compared with it by identity, for which none of the things compared is looked at.
`checks` remembers of a weight by itself that it is right, for calls that differ in x.
"""

from __future__ import annotations

from torch import Tensor

from mmq_kernels.backends import Backend
from mmq_kernels.ops.choice import forced_backend
from mmq_kernels.spec import QuantSpec

_LAST = "_mmq_last_call"
"""Attribute of a weight's tensor. Nothing in it leads back to the weight: that would be a cycle."""


class LastCall:
    """All that checks and choice depend on, but the weight itself; and what they led to."""

    __slots__ = (
        *("scale", "zero", "perm", "input_scale", "bias", "numbers"),
        *("shape", "dtype", "device", "forced", "writable"),
        *("spec", "backend", "kernel"),
    )

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        perm: Tensor | None,
        input_scale: Tensor | None,
        bias: Tensor | None,
        numbers: tuple[object, ...],
        spec: QuantSpec,
        backend: Backend,
        kernel: str,
    ) -> None:
        self.scale, self.zero, self.perm, self.input_scale, self.bias = scale, zero, perm, input_scale, bias
        self.numbers = numbers
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.forced, self.writable = forced_backend(), _writable(perm, input_scale, bias)
        self.spec, self.backend, self.kernel = spec, backend, kernel

    def was(
        self,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        perm: Tensor | None,
        input_scale: Tensor | None,
        bias: Tensor | None,
        numbers: tuple[object, ...],
    ) -> bool:
        """Whether that call was like this one. Tensors count by their identity."""
        return (
            scale is self.scale
            and zero is self.zero
            and perm is self.perm
            and input_scale is self.input_scale
            and bias is self.bias
            and x.dtype is self.dtype
            and x.shape == self.shape
            and x.device == self.device
            and numbers == self.numbers
            and forced_backend() == self.forced
            and _writable(perm, input_scale, bias) == self.writable
        )


def last_call(weight: Tensor) -> LastCall | None:
    """The last call with this weight that went well."""
    return weight.__dict__.get(_LAST) if type(weight) is Tensor else None  # while tracing there is nothing to keep


def keep(weight: Tensor, last: LastCall) -> None:
    """Remember it."""
    if type(weight) is Tensor:
        weight.__dict__[_LAST] = last


def version(perm: Tensor) -> int | None:
    """Changes with each write to `perm`; None where that is not kept."""
    return None if perm.is_inference() else perm._version


def _writable(perm: Tensor | None, input_scale: Tensor | None, bias: Tensor | None) -> tuple[object, ...] | None:
    """What may have changed in a tensor that is still the same; `.to()` changes a parameter in its place."""
    if perm is None and input_scale is None and bias is None:
        return None
    found: tuple[object, ...] = (None if perm is None else version(perm),)
    for vector in (input_scale, bias):
        if vector is not None:
            found += (vector.shape, vector.dtype, vector.device)
    return found
