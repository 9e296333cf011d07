"""Folding an input scale into what produces the input, where that changes nothing.

Layers that read ``x / s`` need no scale of their own if the module that makes x makes ``x / s`` instead: a norm whose
weight (and bias) is divided by s, or a linear whose rows (and bias) are. That is an identity only if nobody else reads
x, and if everything between producer and layer lets a positive factor of each channel through: a ReLU does and a GELU
does not, the product of a gated MLP does for one of its factors, attention does for its values unless several heads
share them.

Whether it is one is not looked up but tried: the producer's output is scaled by powers of two and the layers' input
scaled back. Both are exact, so an identity leaves the block's output as it was, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FUSED = (1, 2, 3)
"""A linear may make x as the last of so many equal parts of its output: values of a fused qkv, a fused gate and up."""

Run = Callable[[], Sequence[Tensor]]

TOLERANCE = 4.0
"""Relative change of a block's output that is put down to the order of its sums, in units of the dtype's epsilon."""


@dataclass(frozen=True)
class Producer:
    """What makes the input of some layers, and can take their scale.

    Attributes:
        name: of the module.
        module: a norm with a weight ``[k]``, or a linear.
        start: first of the k outputs that the layers read.
        offset: what is added to a norm's stored weight (1 in Gemma's).
    """

    name: str
    module: nn.Module
    start: int = 0
    offset: float = 0.0

    def absorb(self, scale: Tensor) -> Tensor:
        """Divide the outputs by `scale` ``[k]``; gives by what they were, rounding of the weight included."""
        weight, bias = self.module.weight, self.module.bias if hasattr(self.module, "bias") else None
        rows = slice(self.start, self.start + len(scale))
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            if weight.dim() == 1:
                before = weight[rows].float() + self.offset
                weight[rows] = (before / scale - self.offset).to(weight.dtype)
                after = weight[rows].float() + self.offset
                scale = torch.where((before != 0) & (after != 0), before / after, scale)
            else:
                weight[rows] = (weight[rows].float() / scale[:, None]).to(weight.dtype)
            if isinstance(bias, Tensor):
                bias[rows] = (bias[rows].float() / scale).to(bias.dtype)
        return scale


def fold(producer: Producer, layers: Sequence[nn.Linear], scale: Tensor) -> Tensor:
    """Move a scale ``[k]`` from the layers' input into what makes it; gives the scale that the layers' weights got."""
    scale = producer.absorb(scale)
    for layer in layers:
        layer.weight.data = (layer.weight.data.float() * scale).to(layer.weight.dtype)
    return scale


def find_producer(block: nn.Module, name: str, layers: Sequence[nn.Linear], run: Run) -> Producer | None:
    """What in a block can take the input scale of some of its layers, or None.

    Args:
        block: a module of the model.
        name: of the block.
        layers: linears in it that are called with the same tensor.
        run: calls the block with fixed inputs, and gives its outputs.
    """
    expected = run()  # of the block as it is now: what was folded before has rounded its weights
    norm, linears = _before(block, layers, run)
    k = layers[0].in_features
    candidates: list[tuple[str, nn.Module, int]] = []
    if norm is not None:
        candidates.append((*norm, 0))
    for path, linear in reversed(linears):
        candidates += [(path, linear, (parts - 1) * k) for parts in FUSED if linear.out_features == parts * k]
    for path, module, start in candidates:
        offset = _offset(module)
        if offset is not None and _is_identity(module, start, layers, run, expected):
            return Producer(f"{name}.{path}".strip("."), module, start, offset)
    return None


def _before(
    block: nn.Module, layers: Sequence[nn.Linear], run: Run
) -> tuple[tuple[str, nn.Module] | None, list[tuple[str, nn.Linear]]]:
    """The norm that makes the layers' input, if one always does, and the linears that run before them."""
    latest: dict[str, tuple[Tensor, nn.Module]] = {}
    linears: dict[str, nn.Linear] = {}
    makers: list[tuple[str, nn.Module] | None] = []

    def norm_hook(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            latest[path] = output, module

        return hook

    def linear_hook(path: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: Any, output: Any) -> None:
            if not makers:
                linears[path] = module

        return hook

    def layer_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["input"]
        makers.append(next(((path, norm) for path, (made, norm) in latest.items() if made is x), None))

    with ExitStack() as hooks:
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and not any(module is layer for layer in layers):
                hooks.callback(module.register_forward_hook(linear_hook(path)).remove)
            elif _is_norm(module, layers[0].in_features):
                hooks.callback(module.register_forward_hook(norm_hook(path)).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(layer_hook, with_kwargs=True).remove)
        run()
    norm = makers[0] if makers and all(maker == makers[0] for maker in makers) else None
    return norm, list(linears.items())


def _is_norm(module: nn.Module, k: int) -> bool:
    parameters = dict(module.named_parameters())
    return (
        "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(parameter.shape == (k,) for parameter in parameters.values())
    )


def _is_identity(
    module: nn.Module, start: int, layers: Sequence[nn.Linear], run: Run, expected: Sequence[Tensor]
) -> bool:
    k = layers[0].in_features
    powers = 2.0 ** torch.randint(-3, 4, (k,), generator=torch.Generator().manual_seed(k))
    powers = powers.to(layers[0].weight)

    def scale(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        before, own, behind = output.tensor_split((start, start + k), dim=-1)
        return torch.cat([before, own / powers, behind], dim=-1)

    def back(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] * powers, *args[1:]), kwargs
        return args, {**kwargs, "input": kwargs["input"] * powers}

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_hook(scale).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(back, with_kwargs=True).remove)
        got = run()
    return all(_close(one, other) for one, other in zip(got, expected, strict=True))


def _close(got: Tensor, expected: Tensor) -> bool:
    allowed = TOLERANCE * torch.finfo(expected.dtype).eps * expected.float().norm()
    return bool((got.float() - expected.float()).norm() <= allowed)


def _offset(module: nn.Module) -> float | None:
    """What a norm adds to its weight: that weight with which its output is nothing tells; None if none does."""
    if isinstance(module, nn.Linear):
        return 0.0
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)[None]
    kept = [(tensor, tensor.detach().clone()) for tensor in (weight, bias) if isinstance(tensor, Tensor)]
    with torch.no_grad():
        try:
            for tensor, _ in kept:
                tensor.zero_()
            for offset in (0.0, 1.0):
                weight.fill_(-offset)
                if not module(x).any():
                    return offset
        except (TypeError, ValueError, RuntimeError):  # not called with one tensor of k columns: no norm that we know
            return None
        finally:
            for tensor, before in kept:
                tensor.copy_(before)
    return None
