"""Which backend serves a call: a pure function of the call, printable, and overridable.

Order: `use_backend(...)`, then the environment variable ``MMQ_BACKEND``, then the first backend of
`backends.NAMES` that can serve. A forced backend that cannot serve raises; nothing falls back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch

from mmq_kernels import backends
from mmq_kernels.backends import Call
from mmq_kernels.spec import QuantSpec

_forced: ContextVar[str | None] = ContextVar("mmq_forced_backend", default=None)


@dataclass(frozen=True)
class Choice:
    """The backend chosen for a call, the kernel of it where it has several ("" otherwise), and why no other."""

    backend: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{'/'.join(filter(None, (self.backend, self.kernel)))}: {self.reason}"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the `with` block onto one backend, or with "cuda/packed" onto one kernel of it.

    Raises:
        ValueError: for an unknown name.
    """
    _parse(name, "backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """What `use_backend` or ``MMQ_BACKEND`` asks for: a backend, "backend/kernel", or None."""
    name = _forced.get()
    if name is None:
        name = os.environ.get("MMQ_BACKEND") or None
        if name is not None:
            _parse(name, "MMQ_BACKEND")
    return name


def _parse(asked: str, source: str) -> tuple[str, str | None]:
    """Backend and kernel of "backend" or "backend/kernel"."""
    name, _, kernel = asked.partition("/")
    if name not in backends.NAMES:
        raise ValueError(f"{source} must be one of {', '.join(backends.NAMES)}, got {asked!r}")
    kernels = backends.backend(name).kernels
    if kernel and kernel not in kernels:
        raise ValueError(f"{source} {name} has kernels {', '.join(kernels) or '(only one)'}, got {asked!r}")
    return name, kernel or None


def select(
    op: str,
    device: torch.device | str,
    *,
    spec: QuantSpec | None = None,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    m: int | None = None,
    n: int | None = None,
    k: int | None = None,
) -> Choice:
    """The backend for one call of an op.

    Args:
        op: name of a public op, or "prepack".
        device: where the tensors are.
        spec, dtype, layout, m, n, k: of the weight and the activation, as far as the op has them.

    Raises:
        RuntimeError: when a forced backend cannot serve the call, or none can.
    """
    forced = forced_backend()
    asked = _parse(forced, "backend")[1] if forced else None
    return _decide(Call(op, torch.device(device), dtype, layout, spec, m, n, k, asked), forced)


@lru_cache(maxsize=2**14)
def _decide(call: Call, forced: str | None) -> Choice:
    """The decision itself; what it depends on besides its arguments does not change while a process runs."""
    names = (forced.partition("/")[0],) if forced else backends.NAMES
    refusals: list[str] = []
    for name in names:
        refusal = _why_not(name, call)
        if refusal is None:
            kernel, why = backends.backend(name).kernel(call)
            reasons = ["asked for"] if forced else refusals
            return Choice(name, kernel, "; ".join(filter(None, (why, *reasons))) or "preferred")
        refusals.append(f"{name}: {refusal}")
    asked_for = f"backend {forced!r} was asked for but" if forced else "no backend"
    raise RuntimeError(f"{asked_for} cannot serve mmq.{call.op} on {call.device}: {'; '.join(refusals)}")


def _why_not(name: str, call: Call) -> str | None:
    candidate = backends.backend(name)
    return candidate.why_unavailable() or candidate.why_not(call)


def explain_all(device: torch.device | str) -> dict[str, str | None]:
    """Why each backend cannot multiply on `device`; None where it can."""
    return {name: _why_not(name, Call("prepack", torch.device(device))) for name in backends.NAMES}
