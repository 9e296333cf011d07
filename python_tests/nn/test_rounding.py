"""Activations of 8 bits as a user meets them: a layer's attribute, the op's argument, checkpoints, torch.compile."""

import copy

import pytest
import torch
from torch import nn

from mmq_kernels import explain, ops
from mmq_kernels.bench.layers import random_layer
from mmq_kernels.nn import QuantLinear, set_activation_bits
from mmq_kernels.spec import QuantSpec

CPU = torch.device("cpu")


@pytest.fixture
def layer() -> QuantLinear:
    return random_layer(40, 96, QuantSpec(4, 32), CPU, torch.float32, bias=True)


def test_the_choice_is_the_users(layer) -> None:
    x = torch.randn(2, 3, 96)
    assert layer.activation_bits == 16 and "activation_bits" not in repr(layer)
    plain = layer(x)
    layer.activation_bits = 8
    rounded = layer(x)
    assert "activation_bits=8" in repr(layer)
    assert rounded.shape == plain.shape and not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())
    with ops.use_backend("reference"):
        torch.testing.assert_close(layer(x), rounded, rtol=1e-6, atol=1e-6)
    layer.activation_bits = 16
    assert torch.equal(layer(x), plain)


def test_other_numbers_are_refused(layer) -> None:
    with pytest.raises(ValueError, match="activation_bits must be 16 or 8, got 4"):
        layer.activation_bits = 4
    with pytest.raises(ValueError, match="activation_bits must be 16 or 8, got 7"):
        set_activation_bits(layer, 7)
    with pytest.raises(ValueError, match="activation_bits must be 16 or 8, got 12"):
        torch.ops.mmq.gemm(*arguments(layer, torch.randn(1, 96)), "", 12)


def arguments(layer: QuantLinear, x: torch.Tensor) -> tuple:
    weight = (layer.weight_runtime, layer.scale_runtime, layer.zero_runtime, None, None, layer.bias)
    return (x, *weight, 4, 32, 40, 96, layer.layout, "none")


def test_backends_that_cannot_say_so_by_name(layer) -> None:
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{name}' was asked for but cannot serve"):
            ops.select("gemm", "cpu", spec=layer.spec, layout="planes", forced=name, activation_bits=8)
    with pytest.raises(RuntimeError, match="activation_bits 8 is for the CPU, the device is meta"):
        ops.select("gemm", "meta", spec=layer.spec, layout="planes", activation_bits=8)
    layer.activation_bits = 8
    assert explain(layer, 3).split(":")[0] in ("cpu", "reference")


def test_gradients_are_those_without_rounding(layer) -> None:
    x = torch.randn(3, 96, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    layer.activation_bits = 8
    (got,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(got, expected)


def test_copies_compiled_layers_and_whole_models_keep_it(layer) -> None:
    model = nn.Sequential(layer, nn.Linear(40, 8), random_layer(16, 8, QuantSpec(3, 8), CPU, torch.float32))
    assert set_activation_bits(model, 8) == 2
    x = torch.randn(4, 96)
    again = copy.deepcopy(model)
    assert [m.activation_bits for m in again if isinstance(m, QuantLinear)] == [8, 8]
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(again(x), expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
    torch.library.opcheck(torch.ops.mmq.gemm, (*arguments(layer, torch.randn(2, 96)), "", 8))
