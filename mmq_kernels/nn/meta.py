"""Modules without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

HUGE = 2**28
"""Elements. Nothing that only a constructor can compute is as large."""

_FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    [torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand, torch.arange, torch.linspace]
)


class _NothingHuge(TorchFunctionMode):
    """New tensors of more than `HUGE` elements have no memory: a config may ask for any size."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None:
            without_memory = func(*args, **{**kwargs, "device": "meta"})
            if without_memory.numel() > HUGE:
                return without_memory
        return func(*args, **kwargs)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every new parameter goes to the meta device before anything fills it; buffers stay real.

    Building a model costs next to no time and memory then, and buffers that only the constructor can compute
    (positions, frequencies) are right.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        with _NothingHuge():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
