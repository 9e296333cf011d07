"""`layer.backend = name`: that backend serves from then on, or the call says why it cannot."""

import copy
import pickle

import pytest
import torch
from packed import Counting, K, gemm_arguments, layer
from torch import nn

from mmq_kernels import _native, backends, explain, ops
from mmq_kernels.backends import Backend
from mmq_kernels.nn import QuantLinear
from mmq_kernels.ops.choice import select

HERE = [name for name in backends.NAMES if backends.backend(name).why_unavailable() is None]
ABSENT = [name for name in backends.NAMES if name not in HERE]

needs_cpu = pytest.mark.skipif(not _native.available(), reason="no compiled extension")


class Seen:
    """Which backends multiplied, and which dequantized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in HERE:
            for what in ("gemm", "dequantize"):
                self._watch(monkeypatch, backends.backend(name), what)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, backend: Backend, what: str) -> None:
        serve = getattr(backend, what)

        def watched(*args, **kwargs):
            self.names.append(f"{backend.name} {what}")
            return serve(*args, **kwargs)

        monkeypatch.setattr(backend, what, watched, raising=False)


def usable(name: str, device: str) -> None:
    try:
        select("prepack", device, spec=layer().spec, k=K, forced=name)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(params=HERE)
def pinned(request, device) -> QuantLinear:
    """A layer pinned to each backend that is here in turn."""
    usable(request.param, device)
    q = layer(ordered=True, scaled=True, activation="gelu").to(device)
    q.backend = request.param
    return q


def test_it_serves_and_says_so(pinned, device, monkeypatch) -> None:
    name = pinned.backend
    assert pinned.layout == backends.backend(name).layout
    seen = Seen(monkeypatch)
    x = torch.randn(3, K, device=device, requires_grad=True)
    y = pinned(x)
    assert seen.names[0] == f"{name} gemm"
    expected = nn.functional.gelu((x / pinned.weight_input_scale) @ pinned.dequantize().t() + pinned.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    seen.names.clear()
    torch.autograd.grad(y.sum(), x)
    assert seen.names[:2] == [f"{name} gemm", f"{name} dequantize"]  # the epilogue's input once more, and the weight
    assert explain(pinned, 3).startswith(name)


@pytest.mark.parametrize("free", [None, ""])
def test_the_choice_is_given_back(free, pinned, device) -> None:
    fresh = layer().to(device)
    pinned.backend = free
    assert (pinned.backend, pinned.layout) == (fresh.backend, fresh.layout)
    assert pinned.pinned == ""


def test_the_weight_is_the_same_in_every_layout(device) -> None:
    q = layer(ordered=True).to(device)
    before, on_disk = q.dequantize(), q.state_dict()
    for name in HERE:
        if backends.backend(name).why_not(backends.Call("prepack", torch.device(device), spec=q.spec, k=K)) is None:
            q.backend = name
            assert torch.equal(q.dequantize(), before)
    q.backend = None
    assert torch.equal(q.dequantize(), before)
    after = q.state_dict()
    assert list(after) == list(on_disk)
    assert all(torch.equal(after[name], tensor) for name, tensor in on_disk.items())


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), lambda q: q.to(torch.float32)]
)
def test_copies_keep_the_pin(copier, pinned, device) -> None:
    x = torch.randn(3, K, device=device)
    twin = copier(pinned)
    assert (twin.pinned, twin.backend, twin.layout) == (pinned.pinned, pinned.backend, pinned.layout)
    assert torch.equal(twin(x), pinned(x))


def test_it_outweighs_use_backend_and_the_environment(device, monkeypatch) -> None:
    q = layer().to(device)
    q.backend = "reference"
    monkeypatch.setenv("MMQ_BACKEND", "cpu")
    seen = Seen(monkeypatch)
    x = torch.randn(3, K, device=device, requires_grad=True)
    with ops.use_backend("cpu"):
        q(x).sum().backward()
        assert q.backend == "reference"
    assert set(seen.names) == {"reference gemm", "reference dequantize"}


def test_compiled_it_is_followed_and_a_change_is_noticed(device, monkeypatch) -> None:
    q = layer().to(device)
    free = q.backend
    counting = Counting()
    compiled = torch.compile(q, fullgraph=True, backend=counting, dynamic=True)
    x = torch.randn(3, K, device=device)
    for compilations, name in ((1, None), (2, "reference"), (2, "reference")):
        q.backend = name
        seen = Seen(monkeypatch)
        torch.testing.assert_close(compiled(x), q(x))
        assert set(seen.names) - {f"{name or free} dequantize"} == {f"{name or free} gemm"}
        assert counting.compiled == compilations


@needs_cpu
def test_a_layout_that_the_pinned_backend_cannot_read_raises() -> None:
    q = layer()
    q.backend = "cpu"
    q.prepack("reference")
    message = "backend 'cpu' was asked for but cannot serve mmq.gemm on cpu: .*layout 'planes'"
    with pytest.raises(RuntimeError, match=message):
        q(torch.randn(3, K))
    with pytest.raises(RuntimeError, match=message):
        _ = q.backend
    assert q.prepack().layout == "cpu"
    assert q(torch.randn(3, K)).shape == (3, 24)


@pytest.mark.parametrize("name", ["tpu", "reference/fast", "cuda/none"])
def test_unknown_names_are_refused(name) -> None:
    q = layer()
    before = q.layout
    for target in (q, layer().to("meta")):
        with pytest.raises(ValueError, match=f"backend .*, got '{name}'"):
            target.backend = name
    assert (q.pinned, q.layout) == ("", before)
    arguments = gemm_arguments(torch.randn(3, K), q)
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    for call in (arguments, on_meta):
        with pytest.raises(ValueError, match=f"backend .*, got '{name}'"):
            torch.ops.mmq.gemm(*call, name)


@pytest.mark.skipif(not ABSENT, reason="every backend is here")
@pytest.mark.parametrize("name", ABSENT)
def test_a_backend_that_is_not_here_leaves_the_layer_as_it_was(name) -> None:
    q = layer()
    before, x = q.layout, torch.randn(3, K)
    expected = q(x)
    with pytest.raises(RuntimeError, match=f"backend '{name}' was asked for but cannot serve mmq.prepack on cpu"):
        q.backend = name
    assert (q.pinned, q.layout) == ("", before)
    assert torch.equal(q(x), expected)


def test_without_data_any_known_backend_can_be_named() -> None:
    """A skeleton on the meta device may be made on another machine than the one that will run it."""
    q = layer().to("meta")
    for name in backends.NAMES:
        q.backend = name
        assert q.layout == backends.backend(name).layout
        assert q.weight_runtime.is_meta
        assert copy.deepcopy(q).layout == q.layout


@needs_cpu
def test_a_pinned_layer_survives_the_way_over_meta() -> None:
    q = layer()
    q.backend = "reference"
    state, x = q.state_dict(), torch.randn(3, K)
    expected = q(x)
    q.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert (q.backend, q.layout) == ("reference", "planes")
    assert torch.equal(q(x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_cpu
def test_a_move_to_where_it_cannot_serve_is_refused_before_anything_moved() -> None:
    q = layer()
    q.backend = "cpu"
    with pytest.raises(RuntimeError, match=r"backend 'cpu' was asked for but cannot serve mmq\.prepack on cuda"):
        q.cuda()
    assert q.device.type == q.bias.device.type == "cpu"
    assert q(torch.randn(3, K)).shape == (3, 24)


@needs_cpu
def test_a_refused_move_leaves_everything_where_it_was(monkeypatch) -> None:
    """The same with a device that no backend serves, which any machine has: nothing of the layer has moved."""
    q = layer(scaled=True)
    q.backend = "cpu"
    refuse = "device is elsewhere"
    why_not = type(backends.backend("cpu")).why_not
    q = q.to("meta")
    monkeypatch.setattr(
        type(backends.backend("cpu")), "why_not", lambda self, call: refuse if call.k == K else why_not(self, call)
    )
    ops.choice._decide.cache_clear()
    with pytest.raises(RuntimeError, match=refuse):
        q.to_empty(device="cpu")
    assert {t.device.type for t in (*q.parameters(), *q.buffers())} == {"meta"}
    monkeypatch.undo()
    ops.choice._decide.cache_clear()
    assert q.to_empty(device="cpu").device.type == "cpu"
