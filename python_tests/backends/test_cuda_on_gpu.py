"""What only a GPU can show: graphs, streams, devices, and the same bits every time. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from cases import Case, linear_bound

import mmq_kernels
from mmq_kernels import ops
from mmq_kernels.backends import backend
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

REASON = backend("cuda").why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no GPU: {REASON}")
CUT = (4, 512, 8192)
"""m, n, k of a product whose tiles are cut between blocks."""


def layer_of(spec: QuantSpec, n: int, k: int, device: str = "cuda:0") -> QuantLinear:
    codes = torch.randint(0, spec.max_code + 1, (n, k), dtype=torch.uint8)
    groups = spec.groups(k)
    zero = torch.randint(0, spec.max_code + 1, (n, groups), dtype=torch.uint8)
    return QuantLinear.from_codes(
        codes, torch.rand(n, groups).half() * 0.01, zero, spec, bias=torch.randn(n).half()
    ).to(device)


def test_gpu_gives_the_same_bits_every_time() -> None:
    m, n, k = CUT
    layer, x = layer_of(QuantSpec(3, 128), n, k), torch.randn(m, k, device="cuda").half()
    first = layer(x)
    assert all(torch.equal(layer(x), first) for _ in range(30))


def test_gpu_graph_replays_with_new_inputs() -> None:
    m, n, k = CUT
    layers = [layer_of(QuantSpec(bits, 64), n, k) for bits in (2, 4, 7)]
    x = torch.randn(m, k, device="cuda").half()
    expected_before = [layer(x) for layer in layers]  # warm-up too
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [layer(x) for layer in layers]
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected_before, strict=True))
    x.copy_(torch.randn(m, k).half())
    graph.replay()
    got = [output.clone() for output in outputs]
    assert all(torch.equal(a, layer(x)) for a, layer in zip(got, layers, strict=True))


def test_gpu_graphs_captured_first_and_replayed_at_once() -> None:
    """Two graphs of the same layer on two streams: neither sees the other's counters."""
    m, n, k = CUT
    layer = layer_of(QuantSpec(4, 128), n, k)
    inputs = [torch.randn(m, k, device="cuda").half() for _ in range(2)]
    expected = [layer(x) for x in inputs]
    graphs, outputs = [], []
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(layer(x))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_gpu_streams_side_by_side() -> None:
    m, n, k = CUT
    layer = layer_of(QuantSpec(5, 128), n, k)
    inputs = [torch.randn(m, k, device="cuda").half() for _ in range(4)]
    expected = [layer(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    outputs: list[list[torch.Tensor]] = [[] for _ in inputs]
    for _ in range(20):
        for x, stream, kept in zip(inputs, streams, outputs, strict=True):
            with torch.cuda.stream(stream):
                kept.append(layer(x))
    torch.cuda.synchronize()
    for kept, want in zip(outputs, expected, strict=True):
        assert all(torch.equal(got, want) for got in kept)


def test_gpu_device_of_the_tensors_counts_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    layer = layer_of(QuantSpec(4, 128), 128, 512, "cuda:1")
    x = torch.randn(3, 512, device="cuda:1").half()
    with torch.cuda.device(0):
        y = layer(x)
    assert y.device == x.device and torch.equal(y, layer(x))


@pytest.mark.parametrize("m", [1, 17, 257, 2048])
def test_gpu_layer_agrees_with_fp64(m) -> None:
    """Large enough for whole waves and a remainder, packed and dense."""
    case = Case(QuantSpec(4, 128), 4304, 1152, torch.float16)
    layer = QuantLinear.from_codes(case.codes, case.scale, case.zero, case.spec).to("cuda")
    assert layer.layout == "cuda" and layer.backend == "cuda"
    x = torch.randn(m, 1152).half()
    expected, bound = linear_bound(case, x, None, "none")
    for kernel in ("cuda/packed", "cuda/dense"):
        with ops.use_backend(kernel):
            assert kernel in mmq_kernels.explain(layer, m)
            got = layer(x.cuda()).cpu().double()
        assert ((got - expected).abs() <= (bound if kernel == "cuda/packed" else 4 * bound)).all()


def test_gpu_and_cpu_hold_the_same_weight() -> None:
    layer = layer_of(QuantSpec(3, 32), 70, 200, "cpu")
    before = layer.on_disk()
    moved = layer.to("cuda")
    after = {name: tensor.cpu() for name, tensor in moved.on_disk().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(moved.to("cpu").dequantize(), layer.dequantize())


def test_gpu_serves_what_its_kernels_do_not_by_another_backend() -> None:
    layer = layer_of(QuantSpec(4, 8), 20, 64)
    assert "group_size is 8, not a multiple of 16" in mmq_kernels.explain(layer)
    x = torch.randn(3, 64, device="cuda").half()
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, layer.dequantize(torch.float16), layer.bias), rtol=1e-2, atol=1e-2
    )
