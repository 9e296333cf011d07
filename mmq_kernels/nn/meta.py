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


_FILLS = frozenset(["normal_", "uniform_", "constant_", "kaiming_uniform_", "zero_", "fill_", "mul_", "add_"])
"""Methods of tensors and functions of `torch.nn.init`, whoever wraps them. Torch takes a millisecond to find out what
`normal_` does to a tensor without memory."""


class _OnMeta(TorchFunctionMode):
    """Tensors of more than `HUGE` elements go to meta: a config may ask for any size. What is there is not filled."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
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
        with _OnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
