"""Gradients of the product in both modes, and the product under `torch.func`.

``gemm`` is linear in x up to its epilogue, and the packed weight is a constant. Its gradient is a product from the
weight's other side, ``gemm_transposed``, and the gradient of that one is ``gemm`` again: each is the other's formula,
so derivatives of any order are right. The transposed product is an op of its own, not a dequantize and a matmul
written out here: those two, differentiated once more, keep the dense weight; and a backend may know a better way.

Not `torch.library.register_autograd`: what it makes refuses `torch.func.grad`, and drops forward-mode tangents without
a word. `derived` is the same kernel around an `autograd.Function` that has all its parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_Vmapped = tuple[Tensor, int]


class Gemm(_SingleLevelFunction):
    """``y = activation(x @ W^T + bias)``; keeps the packed weight, and x and bias only where an epilogue needs them."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:  # type: ignore[override]
        return _below_autograd(torch.ops.mmq.gemm, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *held, bias, bits, group_size, n, k, layout, activation, backend, activation_bits = inputs
        undone = (x, bias) if activation != "none" else (None, None)
        _save(ctx, *held, *undone)
        ctx.numbers, ctx.activation, ctx.backend = (bits, group_size, n, k, layout), activation, backend
        ctx.activation_bits = activation_bits
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *held, x, bias = ctx.saved_tensors
        grad = Gemm._through_epilogue(ctx, grad, x, held, bias)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.mmq.gemm_transposed(grad, *held, *ctx.numbers, ctx.backend)
        if ctx.needs_input_grad[6]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
        return grad_x, *[None] * 5, grad_bias, *[None] * 8

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *tangents: Tensor | None) -> Tensor:
        *held, x, bias = ctx.saved_tensors
        moved = torch.ops.mmq.gemm(tangent, *held, None, *ctx.numbers, "none", ctx.backend)
        if tangents[5] is not None:
            moved = moved + tangents[5].to(moved.dtype)
        return Gemm._through_epilogue(ctx, moved, x, held, bias)

    @staticmethod
    def _through_epilogue(ctx: Any, flow: Tensor, x: Tensor, held: Sequence[Any], bias: Tensor | None) -> Tensor:
        """`flow` times the epilogue's slope, either way; the epilogue's input is computed once more."""
        if ctx.activation == "none":
            return flow
        plain = torch.ops.mmq.gemm(x, *held, bias, *ctx.numbers, "none", ctx.backend, ctx.activation_bits)
        return _activation_backward(flow, plain, ctx.activation)


class GemmTransposed(_SingleLevelFunction):
    """``x = (grad @ W) / input_scale``; keeps the packed weight."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:  # type: ignore[override]
        return _below_autograd(torch.ops.mmq.gemm_transposed, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *held, bits, group_size, n, k, layout, backend = inputs
        _save(ctx, *held)
        ctx.numbers, ctx.backend = (bits, group_size, n, k, layout), backend

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.mmq.gemm(grad, *ctx.saved_tensors, None, *ctx.numbers, "none", ctx.backend)
        return found, *[None] * 11

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return torch.ops.mmq.gemm_transposed(tangent, *ctx.saved_tensors, *ctx.numbers, ctx.backend)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)  # let go of when the forward is done


def _below_autograd(op: Any, arguments: tuple[Any, ...]) -> Tensor:
    """The op as it is without this level of autograd.

    The outer levels of `torch.func`, if there are any, still have to see the call: for them the gradient modes, which
    are off inside an `autograd.Function`, are switched on again.
    """
    with contextlib.ExitStack() as modes:
        if torch._C._are_functorch_transforms_active():
            modes.enter_context(torch.enable_grad())
            modes.enter_context(forward_ad._set_fwd_grad_enabled(True))
        modes.enter_context(torch._C._AutoDispatchBelowAutograd())
        return op(*arguments)


def derived(function: Any, op: Any) -> Callable[..., Tensor]:
    """The kernel of `op` at the autograd key: through `function` where there is something to differentiate."""
    names = [argument.name for argument in op._schema.arguments]
    constants = [i for i, name in enumerate(names) if name in ("scale", "input_scale")]
    variables = [i for i, name in enumerate(names) if name in ("x", "grad", "bias")]
    defaults = [argument.default_value for argument in op._schema.arguments]

    def kernel(keyset: Any, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            for i in constants:
                tensor = arguments[i]
                if tensor is not None and tensor.requires_grad:
                    raise RuntimeError(f"{names[i]} of {op} must not require grad: the weight is a constant")
            tracked = any(arguments[i] is not None and arguments[i].requires_grad for i in variables)
            if tracked or forward_ad._current_level >= 0:
                return _apply(function, *arguments, *defaults[len(arguments) :])
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return kernel


def _apply(function: Any, *arguments: Any) -> Tensor:
    """`function.apply`, at the level of `torch.func` that is being worked on where there is one.

    This kernel is reached once a level, so the function must not be handed to all of them again: torch does that with
    every `autograd.Function`, which is why ours are of the class below.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    if levels.count(torch._C._functorch.TransformType.Jvp) > 1:
        # Torch drops the outer tangent of what any autograd.Function says of its own: a wrong number, and no word.
        raise RuntimeError("mmq::gemm has no forward mode inside forward mode: take one of the two in reverse mode")
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def folded(op: Any) -> Callable[..., _Vmapped]:
    """The vmap rule of an op that takes any leading dims of its first argument: the batch becomes the first of them."""
    names = [argument.name for argument in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], first: Tensor, *rest: Any) -> _Vmapped:
        others = [name for name, dim in zip(names[1:], in_dims[1:], strict=False) if dim is not None]
        if others:
            raise ValueError(f"{names[0]} must be the only batched argument of {op} in vmap, got {', '.join(others)}")
        assert in_dims[0] is not None  # torch calls a rule only where something is batched
        return op(first.movedim(in_dims[0], 0), *rest), 0

    return rule


def register(library: torch.library.Library) -> None:
    """Both products' kernels at the autograd key and their vmap rules."""
    for name, function in (("gemm", Gemm), ("gemm_transposed", GemmTransposed)):
        op = getattr(torch.ops.mmq, name).default
        library.impl(name, derived(function, op), "Autograd", with_keyset=True)
        torch.library.register_vmap(f"mmq::{name}", folded(op), lib=library)


def _activation_backward(grad: Tensor, plain: Tensor, activation: str) -> Tensor:
    """Gradient with respect to the epilogue's input `plain`."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, plain, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, plain)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, plain, approximate="tanh")
    # x * sigmoid(a x); in plain operations, because torch's own silu_backward cannot be differentiated once more.
    steep = 1.0 if activation == "silu" else 1.702
    steeper = steep * plain.float()
    sigmoid = torch.sigmoid(steeper)
    return (grad.float() * sigmoid * (1 + steeper * (1 - sigmoid))).to(grad.dtype)
