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

import torch

from mmq_kernels import backends
from mmq_kernels.spec import QuantSpec

_forced: ContextVar[str | None] = ContextVar("mmq_forced_backend", default=None)


@dataclass(frozen=True)
class Choice:
    """The backend chosen for a call, and why it and no other."""

    backend: str
    reason: str


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the `with` block onto one backend.

    Raises:
        ValueError: for an unknown name.
    """
    backends.backend(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that `use_backend` or ``MMQ_BACKEND`` asks for, or None."""
    name = _forced.get() or os.environ.get("MMQ_BACKEND") or None
    if name is not None and name not in backends.NAMES:
        raise ValueError(f"MMQ_BACKEND must be one of {', '.join(backends.NAMES)}, got {name!r}")
    return name


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
    device = torch.device(device)
    forced = forced_backend()
    refusals: list[str] = []
    for name in (forced,) if forced else backends.NAMES:
        refusal = _why_not(name, op, device, dtype, layout)
        if refusal is None:
            reason = "asked for" if forced else "; ".join(refusals) or "preferred"
            return Choice(name, reason)
        refusals.append(f"{name}: {refusal}")
    asked = f"backend {forced!r} was asked for but" if forced else "no backend"
    raise RuntimeError(f"{asked} cannot serve mmq.{op} on {device}: {'; '.join(refusals)}")


def _why_not(name: str, op: str, device: torch.device, dtype: torch.dtype | None, layout: str | None) -> str | None:
    candidate = backends.backend(name)
    return candidate.why_unavailable() or candidate.why_not(op, device, dtype, layout)


def explain_all(device: torch.device | str) -> dict[str, str | None]:
    """Why each backend cannot multiply on `device`; None where it can."""
    return {name: _why_not(name, "prepack", torch.device(device), None, None) for name in backends.NAMES}
