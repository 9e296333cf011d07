"""Loads the compiled extension, lazily, and says what it can do or why it is missing."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch  # noqa: F401  # first: it brings the OpenMP pool that the extension shares


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or why there is none."""
    try:
        return importlib.import_module("mmq_kernels._C"), None
    except ModuleNotFoundError:
        return None, "the compiled extension is not installed (built with MMQ_BUILD=none, or not built)"
    except ImportError as error:
        return None, f"the compiled extension does not load: {error}"


def available() -> bool:
    """Whether the compiled kernels can be called."""
    return _load()[0] is not None


def why_missing() -> str | None:
    """Why they cannot, or None."""
    return _load()[1]


def module() -> Any:
    """The extension itself.

    Raises:
        RuntimeError: where it is missing, saying why.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def isa() -> str:
    """Instruction set whose kernels run: the best of this machine, or what ``MMQ_CPU_ISA`` asks for.

    Raises:
        ValueError: when ``MMQ_CPU_ISA`` names none that this machine can run.
    """
    return module().isa()


def isas() -> tuple[str, ...]:
    """Instruction sets that this machine can run, best last."""
    return tuple(module().isas().split(", "))


def build_info() -> dict[str, str | None]:
    """Compiler, CUDA architectures (None: built without CUDA) and version of the extension."""
    native = module()
    return {"compiler": native.compiler, "cuda_archs": native.cuda_archs, "version": native.version}


def cuda_devices() -> dict[str, Any]:
    """GPUs as the CUDA runtime sees them: ``devices`` (name, compute_capability, memory_bytes, multiprocessors),
    ``driver`` and ``runtime`` versions as CUDA numbers them, and ``reason``, why there is no device, or "".
    """
    return module().cuda_devices()
