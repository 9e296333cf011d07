"""Gradients with respect to x and bias against the dense layer, of both orders, and what is kept to compute them."""

import weakref

import pytest
import torch
from packed import EPILOGUES, K, N, block, dense, gemm_arguments, layer, tokens
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

KINDS = {
    "plain": {},
    "ordered": {"ordered": True},
    "scaled": {"scaled": True},
    "both": {"ordered": True, "scaled": True},
}


def trainable(device: str, **settings) -> QuantLinear:
    q = layer(**settings).to(device)
    if q.bias is not None:
        q.bias.requires_grad_(True)
    return q


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", EPILOGUES)
def test_first_and_second_order_are_those_of_the_dense_layer(kind, activation, device) -> None:
    q = trainable(device, activation=activation, **KINDS[kind])
    x = torch.randn(2, 3, K, device=device, requires_grad=True)
    upstream = torch.randn(2, 3, N, device=device, requires_grad=True)
    found = []
    for run in (q, dense(q)):
        first = torch.autograd.grad(run(x), (x, q.bias), upstream, create_graph=True)
        second = torch.autograd.grad(sum((g * g.detach().cos()).sum() for g in first), (x, upstream), allow_unused=True)
        found.append([*first, *second])
    got, expected = found
    # The dense layer has no second derivative in x where its epilogue is linear: torch says None, or zero.
    for ours, theirs in zip(got, expected, strict=True):
        ours, theirs = (torch.zeros(()) if g is None else g.detach().cpu() for g in (ours, theirs))
        largest = 1 + float(theirs.abs().max())
        torch.testing.assert_close(*torch.broadcast_tensors(ours, theirs), rtol=1e-4, atol=2e-5 * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", EPILOGUES)
def test_low_precision_gradients_are_near_those_of_fp32(activation, dtype, device) -> None:
    q = trainable(device, activation=activation)
    q.bias.data = q.bias.data.to(dtype).float()
    x = torch.randn(5, K, device=device).to(dtype)
    upstream = torch.randn(5, N, device=device).to(dtype)
    exact = x.float().requires_grad_(True)
    expected = torch.autograd.grad(dense(q)(exact), (exact, q.bias), upstream.float())
    low = x.requires_grad_(True)
    q.to(dtype)
    got = torch.autograd.grad(q(low), (low, q.bias), upstream)
    assert [g.dtype for g in got] == [dtype, dtype]
    for ours, theirs in zip(got, expected, strict=True):
        step = torch.finfo(dtype).eps * float(theirs.abs().max())
        assert float((ours.float() - theirs).abs().max()) <= 4 * step


def test_rows_there_are_none_of(device) -> None:
    q = trainable(device, activation="silu")
    x = torch.randn(2, 0, K, device=device, requires_grad=True)
    grad_x, grad_bias = torch.autograd.grad(q(x).sum(), (x, q.bias))
    assert grad_x.shape == x.shape
    assert torch.equal(grad_bias, torch.zeros_like(grad_bias))


def test_bias_alone(device) -> None:
    q = trainable(device, activation="gelu")
    x = torch.randn(5, K, device=device)
    (got,) = torch.autograd.grad(q(x).square().sum(), q.bias)
    (expected,) = torch.autograd.grad(dense(q)(x).square().sum(), q.bias)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("position", "name"), [(2, "scale"), (5, "input_scale")])
def test_constants_that_are_to_be_trained_are_refused(position, name, device) -> None:
    arguments = gemm_arguments(torch.randn(3, K, device=device), layer(scaled=True).to(device))
    arguments[position] = arguments[position].clone().requires_grad_(True)
    with pytest.raises(RuntimeError, match=f"^{name} of mmq.gemm.default must not require grad"):
        torch.ops.mmq.gemm(*arguments)
    with torch.no_grad():
        assert torch.ops.mmq.gemm(*arguments).shape == (3, N)


def saved_by(module: nn.Module, x: Tensor, twice: bool = False) -> list[Tensor]:
    """Every tensor that autograd keeps for the backward of a call, and `twice`, for the backward of that backward."""
    kept: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        torch.autograd.grad(module(x).square().sum(), x, create_graph=twice)
    return kept


@pytest.mark.parametrize("how", ["eager", "twice", "compiled"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_no_dense_weight_is_kept_for_the_backward(activation, how, device) -> None:
    """Nor for the backward of the backward, where a matmul of the formula's own would keep what it multiplies."""
    n, k, m = 96, 160, 3
    q = trainable(device, n=n, k=k, spec=QuantSpec(4, 32), activation=activation)
    run = torch.compile(q, fullgraph=True, backend="aot_eager_decomp_partition") if how == "compiled" else q
    kept = saved_by(run, torch.randn(m, k, device=device, requires_grad=True), twice=how == "twice")
    assert kept
    assert max(t.numel() * t.element_size() for t in kept) <= q.weight_runtime.numel() * 4
    floats = [t for t in kept if t.dtype == torch.float32]
    assert all(t.numel() <= m * k for t in floats), [tuple(t.shape) for t in floats]


def test_a_linear_layer_keeps_no_activations(device) -> None:
    q = trainable(device)
    x = torch.randn(7, K, device=device, requires_grad=True)
    x = x * 1  # not a leaf, so that nothing but the layer could hold it
    y, alive = q(x), weakref.ref(x)
    del x
    assert alive() is None
    assert y.requires_grad


def test_what_is_offloaded_leaves_memory(device) -> None:
    """Whoever packs away what autograd keeps must not find it held by the layer as well."""
    q = trainable(device, activation="gelu")
    x = torch.randn(7, K, device=device, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        y, alive = q(x), weakref.ref(x)
    del x
    assert alive() is None
    y.sum().backward()


def test_activation_checkpointing(device) -> None:
    module = block("vision").to(device)
    x = tokens(5).to(device).requires_grad_(True)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(got, expected)
    checkpoint(module, x, use_reentrant=True).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("kind", ["vision", "qformer", "language"])
def test_compiled_training_is_the_eager_one(kind, device) -> None:
    module = block(kind).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    counters.clear()
    for m in (3, 4, 5, 9):
        x = tokens(m).to(device).requires_grad_(True)
        (expected,) = torch.autograd.grad(module(x).square().sum(), x)
        (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_training_through_inductor(device) -> None:
    q = trainable(device, activation="gelu", ordered=True)
    module = nn.Sequential(q, nn.LayerNorm(N).to(device))
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(6, K, device=device, requires_grad=True)
    wanted = (x, q.bias, module[1].weight)
    expected = torch.autograd.grad(module(x).square().sum(), wanted)
    got = torch.autograd.grad(compiled(x).square().sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
