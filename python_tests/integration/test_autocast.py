"""Packed layers under `torch.autocast`: its dtype, eager and compiled, forward and backward."""

import pytest
import torch
from packed import Counting, K, block, layer, tokens
from torch import Tensor, nn

DTYPES = {"cpu": (torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16)}


@pytest.fixture(params=[0, 1], ids=["bf16", "fp16"])
def dtype(request, device) -> torch.dtype:
    return DTYPES[device][request.param]


@pytest.mark.parametrize("settings", [{}, {"ordered": True, "scaled": True, "activation": "gelu"}])
def test_the_output_has_its_dtype_and_the_values_of_a_cast(settings, dtype, device) -> None:
    q = layer(**settings).to(device)
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K, device=device)
    with torch.autocast(device, dtype):
        eager, whole = q(x), compiled(x)
    assert eager.dtype == whole.dtype == dtype
    assert torch.equal(eager, q(x.to(dtype)))
    assert torch.equal(whole, eager)
    assert q(x).dtype == torch.float32


def test_switched_off_inside_it_leaves_x_alone(device) -> None:
    q = layer().to(device)
    x = torch.randn(5, K, device=device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert torch.equal(q(x), q(x.float()))
        assert q(x).dtype == torch.float32


class Inside(nn.Module):
    """A model that switches autocast on by itself."""

    def __init__(self, inner: nn.Module, device: str) -> None:
        super().__init__()
        self.inner, self.device = inner, device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.inner(x)


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_a_block_is_one_graph(kind, device) -> None:
    module = Inside(block(kind), device).to(device)
    counting = Counting()
    compiled = torch.compile(module, fullgraph=True, backend=counting, dynamic=True)
    for m in range(2, 7):
        x = tokens(m).to(device)
        torch.testing.assert_close(compiled(x), module(x), rtol=2e-2, atol=2e-2)
    assert counting.compiled == 1


def test_gradients_come_back_in_the_dtype_of_x(dtype, device) -> None:
    q = layer(activation="gelu").to(device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype):
        eager, whole = q(x), compiled(x)
    low = x.detach().to(dtype).requires_grad_(True)
    (expected,) = torch.autograd.grad(q(low).float().square().sum(), low)
    for y in (eager, whole):
        (got,) = torch.autograd.grad(y.float().square().sum(), x)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected.float(), rtol=2e-2, atol=2e-2)


def test_a_backward_inside_autocast_keeps_the_dtype_of_the_forward(device) -> None:
    """fp32 in, computed outside autocast: the gradient product must not be cast because it is called inside."""
    q = layer().to(device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    y = q(x).square().sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        (got,) = torch.autograd.grad(y, x)
    assert torch.equal(got, expected)
