"""`torch.export` of packed layers and blocks: saved, loaded and run for any number of tokens."""

import io

import pytest
import torch
from packed import BLOCKS, K, block, layer, tokens
from torch import nn
from torch.export import Dim, ExportedProgram

from mmq_kernels.spec import QuantSpec

STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])

LAYERS = {
    "asymmetric": {},
    "symmetric": {"spec": QuantSpec(3, 8, True), "activation": "gelu"},
    "no bias": {"bias": False},
    "ordered": {"ordered": True},
    "symmetric and ordered": {"spec": QuantSpec(3, 8, True), "ordered": True},
    "scaled": {"scaled": True},
    "all": {"ordered": True, "scaled": True, "activation": "silu"},
}


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    written = io.BytesIO()
    torch.export.save(program, written)
    return torch.export.load(io.BytesIO(written.getvalue()))


@STRICT
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_exported(kind, strict, device) -> None:
    module = layer(**LAYERS[kind]).to(device)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(5, K, device=device)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: Dim("m")},), strict=strict)
    loaded = through_a_file(program).module()
    for m in (1, 2, 5, 64):
        x = torch.randn(m, K, device=device)
        assert torch.equal(loaded(x), module(x))
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@STRICT
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_exported(kind, strict, device) -> None:
    module = block(kind).to(device)
    m = Dim("m", min=2, max=512)
    program = torch.export.export(module, (tokens(5).to(device),), dynamic_shapes=({1: m},), strict=strict)
    loaded = through_a_file(program).module()
    for length in (2, 3, 5, 17):
        x = tokens(length).to(device)
        torch.testing.assert_close(loaded(x), module(x))


@STRICT
def test_the_program_holds_the_weight_once_and_packed(strict, device) -> None:
    """Runtime tensors are constants of the program; its state_dict is that of the parameters."""
    q = layer(n=256, k=512, bias=False, spec=QuantSpec(4, 64)).to(device)
    module = nn.Sequential(q)
    x = torch.randn(5, 512, device=device)
    program = torch.export.export(module, (x,), strict=strict)
    assert not program.state_dict
    held = [t for t in program.constants.values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in held) == q.packed_bytes
    assert {node.target for node in program.graph.nodes if node.op == "call_function"} == {torch.ops.mmq.gemm.default}


def test_a_program_follows_a_pin(device) -> None:
    """What the layer was pinned to is part of the program."""
    module = layer().to(device)
    module.backend = "reference"
    x = torch.randn(5, K, device=device)
    program = through_a_file(torch.export.export(module, (x,)))
    (call,) = [node for node in program.graph.nodes if node.target is torch.ops.mmq.gemm.default]
    assert "reference" in (*call.args, *call.kwargs.values())
    assert torch.equal(program.module()(x), module(x))


def test_a_decomposed_program_still_calls_the_op(device) -> None:
    module = block("vision").to(device)
    x = tokens(5).to(device)
    program = torch.export.export(module, (x,)).run_decompositions()
    calls = [node for node in program.graph.nodes if node.target is torch.ops.mmq.gemm.default]
    assert len(calls) == 4
    torch.testing.assert_close(program.module()(x), module(x))


def test_training_goes_through_a_program(device) -> None:
    module = layer(activation="gelu").to(device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    program = torch.export.export(module, (x,))
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    (got,) = torch.autograd.grad(program.module()(x).square().sum(), x)
    assert torch.equal(got, expected)
