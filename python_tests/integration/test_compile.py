"""Packed blocks under `torch.compile`: whole graphs, the values of eager, and one graph for every number of tokens."""

import pytest
import torch
from packed import BLOCKS, WIDTH, Counting, K, block, layer, tokens
from torch import nn
from torch._dynamo.utils import counters

from mmq_kernels.spec import QuantSpec


def graph_breaks() -> int:
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_one_graph(kind, device) -> None:
    module = block(kind).to(device)
    counting = Counting()
    compiled = torch.compile(module, fullgraph=True, backend=counting)
    x = tokens(7).to(device)
    counters.clear()
    torch.testing.assert_close(compiled(x), module(x))
    assert counting.compiled == 1
    assert graph_breaks() == 0


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_through_inductor_is_the_eager_one(kind, device) -> None:
    module = block(kind).to(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for m in (7, 12):
        x = tokens(m).to(device)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic", "marked"])
def test_twenty_numbers_of_tokens_need_one_graph(kind, marked, device) -> None:
    module = block(kind).to(device)
    counting = Counting()
    compiled = torch.compile(module, fullgraph=True, backend=counting, dynamic=None if marked else True)
    for m in range(2, 22):
        x = tokens(m).to(device)
        if marked:
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), module(x))
    assert counting.compiled == 1


def test_through_aot_too_twenty_numbers_need_one_graph(device) -> None:
    """The same where the graph is lowered to the ops: shapes go through the fakes."""
    module = block("vision").to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    counters.clear()
    for m in range(2, 22):
        x = tokens(m).to(device)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


def test_a_single_token_is_a_graph_of_its_own(device) -> None:
    """Torch's own rule, for any module: a length of 0 or 1 is never a symbol, so it gets its own graph, once."""
    module = nn.Sequential(layer(), nn.Tanh()).to(device)
    counting = Counting()
    compiled = torch.compile(module, fullgraph=True, backend=counting, dynamic=True)
    for expected, m in ((1, 2), (2, 1), (3, 0), (3, 1), (3, 0), (3, 9)):
        x = torch.randn(m, K, device=device)
        torch.testing.assert_close(compiled(x), module(x))
        assert counting.compiled == expected, m


@pytest.mark.parametrize(
    "settings", [{"ordered": True}, {"scaled": True}, {"spec": QuantSpec(3, 8, True), "bias": False}]
)
def test_every_kind_of_layer_is_one_graph(settings, device) -> None:
    module = layer(**settings, activation="quick_gelu").to(device)
    counting = Counting()
    compiled = torch.compile(module, fullgraph=True, backend=counting, dynamic=True)
    for m in (2, 3, 50):
        x = torch.randn(m, 5, K, device=device)
        assert torch.equal(compiled(x), module(x))
    assert counting.compiled == 1


@torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True)
def test_the_ops_say_that_they_keep_the_compilers_rules(device) -> None:
    module = layer(activation="gelu").to(device)
    x = torch.randn(3, K, device=device)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_what_fakes_refuse_stops_the_compiler_with_its_reason(device) -> None:
    compiled = torch.compile(layer().to(device), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"x shape must be \[\.\.\., 40\], got \[3, 32\]"):
        compiled(torch.randn(3, WIDTH, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", BLOCKS)
def test_cuda_graphs_replay_a_block(kind) -> None:
    """mode="reduce-overhead": inputs that change in place of the recorded ones must change the outputs."""
    module = block(kind).half().cuda()
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    counters.clear()
    with torch.no_grad():
        for _ in range(4):
            x = tokens(8).half().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), module(x), rtol=1e-2, atol=1e-2)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert graph_breaks() == 0
