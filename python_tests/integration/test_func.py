"""`torch.func` over a packed layer: both modes, batched, and nested in one another."""

import pytest
import torch
from packed import EPILOGUES, K, N, dense, gemm_arguments, layer
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from mmq_kernels.nn import QuantLinear

KINDS = {"plain": {}, "ordered and scaled": {"ordered": True, "scaled": True}}


@pytest.fixture(params=[(a, k) for a in EPILOGUES for k in KINDS], ids=lambda p: f"{p[0]}-{p[1]}")
def q(request, device) -> QuantLinear:
    activation, kind = request.param
    return layer(activation=activation, **KINDS[kind]).to(device)


def close(got: object, expected: object) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_reverse_mode(q, device) -> None:
    x, upstream = torch.randn(3, K, device=device), torch.randn(3, N, device=device)
    theirs = dense(q)
    close(grad(lambda x: q(x).square().sum())(x), grad(lambda x: theirs(x).square().sum())(x))
    close(vjp(q, x)[1](upstream), vjp(theirs, x)[1](upstream))
    close(jacrev(q)(x[0]), jacrev(theirs)(x[0]))


def test_forward_mode(q, device) -> None:
    x, tangent = torch.randn(3, K, device=device), torch.randn(3, K, device=device)
    theirs = dense(q)
    close(jvp(q, (x,), (tangent,)), jvp(theirs, (x,), (tangent,)))
    close(jacfwd(q)(x[0]), jacfwd(theirs)(x[0]))
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(q(forward_ad.make_dual(x, tangent))).tangent
    close(moved, jvp(theirs, (x,), (tangent,))[1])


def test_batches(q, device) -> None:
    theirs = dense(q)
    x = torch.randn(4, 2, K, device=device)
    assert torch.equal(vmap(q)(x), q(x))
    assert torch.equal(vmap(q, in_dims=1, out_dims=1)(x), q(x))
    assert torch.equal(vmap(vmap(q))(x), q(x))
    close(vmap(q)(x[:, 0]), theirs(x[:, 0]))
    assert vmap(q)(x[:0]).shape == (0, 2, N)


def test_gradients_of_each_sample(q, device) -> None:
    theirs, x = dense(q), torch.randn(4, K, device=device)

    def loss(run):
        return lambda x, bias: run(x, bias).square().sum()

    ours = loss(lambda x, bias: functional_call(q, {"bias": bias}, (x,)))
    got = vmap(grad(ours, argnums=(0, 1)), in_dims=(0, None))(x, q.bias.detach())
    close(got, vmap(grad(loss(theirs), argnums=(0, 1)), in_dims=(0, None))(x, q.bias.detach()))


def test_nested(q, device) -> None:
    """Each level has to see the call: one that does not leaves a zero where a second derivative should be."""
    theirs, x = dense(q), torch.randn(K, device=device)

    def loss(run):
        return lambda x: run(x).pow(3).sum()

    expected = jacrev(jacrev(loss(theirs)))(x)
    assert float(expected.abs().max()) > 1
    for nested in (lambda f: jacrev(jacrev(f)), hessian, lambda f: jacrev(jacfwd(f))):
        torch.testing.assert_close(nested(loss(q))(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    close(grad(lambda x: vmap(q)(x).square().sum())(x[None]), grad(lambda x: theirs(x).square().sum())(x[None]))


def test_forward_mode_inside_forward_mode_is_refused(device) -> None:
    """Torch computes it wrong for every autograd.Function, in silence; not so here."""
    q = layer(activation="gelu").to(device)
    with pytest.raises(RuntimeError, match="no forward mode inside forward mode: take one of the two"):
        jacfwd(jacfwd(lambda x: q(x).sum()))(torch.randn(K, device=device))


def test_outside_autograd_sees_through_it(device) -> None:
    q = layer(activation="silu").to(device)
    x = torch.randn(K, device=device, requires_grad=True)

    def slope(run) -> Tensor:
        inner = grad(lambda t: run(t).square().sum())(x)
        return torch.autograd.grad(inner.square().sum(), x)[0]

    torch.testing.assert_close(slope(q), slope(dense(q)), rtol=1e-3, atol=1e-2)


def test_tangents_of_bias(device) -> None:
    q = layer(activation="gelu").to(device)
    x, tangent = torch.randn(3, K, device=device), torch.randn(N, device=device)

    def ours(bias: Tensor) -> Tensor:
        return functional_call(q, {"bias": bias}, (x,))

    bias = q.bias.detach()
    close(jvp(ours, (bias,), (tangent,)), jvp(lambda b: dense(q)(x, b), (bias,), (tangent,)))


def test_no_grad_outside_is_kept(device) -> None:
    q, x = layer().to(device), torch.randn(3, K, device=device, requires_grad=True)
    with torch.no_grad():
        assert not q(x).requires_grad
        assert not vmap(q)(x).requires_grad
        assert not jvp(q, (x,), (x,))[1].requires_grad


@pytest.mark.parametrize(("position", "name"), [(1, "weight"), (2, "scale"), (6, "bias")])
def test_only_x_may_be_batched(position, name, device) -> None:
    arguments = gemm_arguments(torch.randn(3, K, device=device), layer().to(device))
    many = torch.stack([arguments[position].detach()] * 2)

    def call(one: Tensor) -> Tensor:
        return torch.ops.mmq.gemm(*arguments[:position], one, *arguments[position + 1 :])

    with pytest.raises(
        ValueError, match=f"x must be the only batched argument of mmq.gemm.default in vmap, got {name}"
    ):
        vmap(call)(many)


def test_compiled(device) -> None:
    q = layer(activation="gelu").to(device)
    x = torch.randn(4, K, device=device)

    def each(x: Tensor) -> Tensor:
        return vmap(grad(lambda t: q(t).square().sum()))(x)

    close(torch.compile(each, backend="aot_eager", fullgraph=True)(x), each(x))


def test_a_tensor_that_outlived_its_transform(q, device) -> None:
    x, kept = torch.randn(3, K, device=device, requires_grad=True), []

    def loss(x: Tensor) -> Tensor:
        kept.append(1 * x)
        return q(x).square().sum()

    expected = grad(loss)(x)
    assert torch.equal(q(kept[0]), q(x))
    q(kept[0]).square().sum().backward()
    close(x.grad, expected)
