"""Which backend serves a call: a pure function of the call, printable, and overridable.

Order: `use_backend(...)`, then the environment variable ``MMQ_BACKEND``, then the backend that can serve and costs the
least (`backends/costs.py`). A forced backend that cannot serve raises; nothing falls back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from mmq_kernels import backends
from mmq_kernels.backends import Call
from mmq_kernels.backends.costs import costs
from mmq_kernels.spec import QuantSpec

forced_in_context: ContextVar[str | None] = ContextVar("mmq_forced_backend", default=None)


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
    parse(name, "backend")
    token = forced_in_context.set(name)
    try:
        yield
    finally:
        forced_in_context.reset(token)


def forced_backend() -> str | None:
    """What `use_backend` or ``MMQ_BACKEND`` asks for: a backend, "backend/kernel", or None."""
    name = forced_in_context.get()
    if name is None:
        name = os.environ.get("MMQ_BACKEND") or None
        if name is not None:
            parse(name, "MMQ_BACKEND")
    return name


def parse(asked: str, source: str) -> tuple[str, str | None]:
    """Backend and kernel of "backend" or "backend/kernel".

    Args:
        source: who asks, for the error.

    Raises:
        ValueError: for an unknown backend or kernel.
    """
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
    forced: str | None = None,
    activation_bits: int = 16,
) -> Choice:
    """The backend for one call of an op.

    Args:
        op: name of a public op, or "prepack".
        device: where the tensors are.
        spec, dtype, layout, m, n, k: of the weight and the activation, as far as the op has them.
        forced: a backend, or "backend/kernel", that must serve; default: what `forced_backend` says.
        activation_bits: of a gemm, see `mmq_kernels.ops.gemm`.

    Raises:
        ValueError: for an unknown `forced`.
        RuntimeError: when a forced backend cannot serve the call, or none can.
    """
    forced = forced or forced_backend()
    asked = parse(forced, "backend")[1] if forced else None
    return _decide(Call(op, torch.device(device), dtype, layout, spec, m, n, k, asked, activation_bits), forced)


@lru_cache(maxsize=2**14)
def _decide(call: Call, forced: str | None) -> Choice:
    """The decision itself; what it depends on besides its arguments does not change while a process runs."""
    names = (forced.partition("/")[0],) if forced else backends.NAMES
    table = costs(call.device.type, _gpu_name(call.device))
    able: list[tuple[float, str, str]] = []
    refusals: list[str] = []
    for name in names:
        refusal = _why_not(name, call)
        if refusal is not None:
            refusals.append(f"{name}: {refusal}")
            continue
        for kernel in _kernels(name, call):
            label = _label(name, kernel)
            refusal = backends.backend(name).why_not_kernel(call, kernel) if kernel else None
            if refusal is not None:
                refusals.append(f"{label}: {refusal}")
            else:
                able.append((table.seconds(_priced(name, kernel), call), name, kernel))
    if not able:
        asked_for = f"backend {forced!r} was asked for but" if forced else "no backend"
        raise RuntimeError(f"{asked_for} cannot serve mmq.{call.op} on {call.device}: {'; '.join(refusals)}")
    ranked = sorted(able, key=lambda entry: entry[0])  # stable: of equals the first of NAMES
    _, name, kernel = ranked[0]
    reasons = ["asked for"] if forced else []
    if len(ranked) > 1:
        prices = [f"{_label(n, k)} {seconds * 1e6:.3g} us" for seconds, n, k in ranked]
        tokens = "" if call.m is None else f"m = {call.m}, "
        reasons.append(f"{tokens}{', '.join(prices)} ({table})")
    return Choice(name, kernel, "; ".join(reasons + refusals) or "the only one")


def _kernels(name: str, call: Call) -> tuple[str, ...]:
    """The ways of a backend to serve a call; "" where it has only one."""
    kernels = backends.backend(name).kernels
    if not kernels or call.op != "gemm":
        return ("",)
    return (call.asked,) if call.asked else kernels


def _priced(name: str, kernel: str) -> str:
    """The entry of the table of costs for a call: that of a backend's first kernel where none is named."""
    kernels = backends.backend(name).kernels
    return _label(name, kernel or (kernels[0] if kernels else ""))


def _label(name: str, kernel: str) -> str:
    return f"{name}/{kernel}" if kernel else name


def _why_not(name: str, call: Call) -> str | None:
    candidate = backends.backend(name)
    refusal = candidate.why_unavailable()
    if refusal is None and call.activation_bits not in candidate.activation_bits:
        refusal = f"activation_bits is {call.activation_bits}, it multiplies activations as they are"
    return refusal or candidate.why_not(call)


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else ""


def explain_all(device: torch.device | str) -> dict[str, str | None]:
    """Why each backend cannot multiply on `device`; None where it can."""
    return {name: _why_not(name, Call("prepack", torch.device(device))) for name in backends.NAMES}
