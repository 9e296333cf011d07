"""A low-rank adapter, in plain torch, on a frozen packed model: it trains, and packed weights stay what they are."""

import pytest
import torch
from packed import block, tokens
from torch import Tensor, nn

from mmq_kernels.nn import QuantLinear


class LowRank(nn.Module):
    """``packed(x) + (x @ A^T) @ B^T``; B starts at zero, so that the adapted model starts as the packed one."""

    def __init__(self, packed: QuantLinear, rank: int = 4) -> None:
        super().__init__()
        self.packed = packed
        self.a = nn.Parameter(torch.randn(rank, packed.in_features) / packed.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(packed.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x) + (x @ self.a.t()) @ self.b.t()


def adapted(kind: str, device: str) -> nn.Module:
    module = block(kind)
    for name, child in list(module.named_modules()):
        if isinstance(child, QuantLinear):
            module.set_submodule(name, LowRank(child))
    return module.to(device)


def packed_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, child in module.named_modules()
        if isinstance(child, QuantLinear)
        for key, tensor in (*child.state_dict().items(), *child.named_buffers())
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["vision", "language"])
def test_an_adapter_learns_and_the_packed_weights_stay(kind, compiled, device) -> None:
    module = adapted(kind, device)
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    before = packed_tensors(module)
    x = tokens(16).to(device)
    with torch.no_grad():  # what another adapter of the same kind would make of it
        shift = torch.randn(4, x.shape[-1], device=device)
        target = module(x) + (x @ shift.t()) @ torch.randn(4, x.shape[-1], device=device) * 0.1
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 2 * sum(isinstance(m, QuantLinear) for m in module.modules())
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(run(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses
    after = packed_tensors(module)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_step_is_that_of_the_dense_model(device) -> None:
    """Gradients of the adapter through packed layers below and above it, against the same model made dense."""
    module = adapted("vision", device)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, LowRank):
                child.b.normal_(std=0.1)
    x = tokens(6).to(device)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(module(x).square().sum(), list(trained.values()))
    for child in module.modules():
        if isinstance(child, LowRank):
            linear = nn.Linear(child.packed.in_features, child.packed.out_features, device=device)
            linear.weight.data, linear.bias.data = child.packed.dequantize(), child.packed.bias.data
            child.packed = linear
    expected = torch.autograd.grad(module(x).square().sum(), list(trained.values()))
    for name, ours, theirs in zip(trained, got, expected, strict=True):
        tolerance = 1e-4 * (1 + float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) <= tolerance, name
