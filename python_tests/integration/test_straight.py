"""Calls that leave torch's dispatcher out, and what one call remembers for the next: nothing may be seen of either."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from packed import K, N, layer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmq_kernels import _native, ops
from mmq_kernels.backends.cpu import CpuBackend
from mmq_kernels.ops import dispatch, repeated
from mmq_kernels.spec import QuantSpec

SETTINGS = [{"ordered": True, "scaled": True}, {"bias": True}]
"""With what Python does to x before the kernel, and without."""

needs_extension = pytest.mark.skipif(not _native.available(), reason="no compiled extension")


class Seen(TorchDispatchMode):
    """Counts the products that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.products += function is torch.ops.mmq.gemm.default
        return function(*arguments, **(keywords or {}))


class Looks(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class Labelled(torch.Tensor):
    pass


def counted(monkeypatch) -> list[int]:
    """How often a call was checked."""
    checked = []
    whole = ops.checks.gemm
    monkeypatch.setattr(ops.checks, "gemm", lambda *arguments: checked.append(1) or whole(*arguments))
    return checked


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("settings", [{}, {"ordered": True, "scaled": True, "activation": "gelu", "bias": True}])
def test_same_bits_either_way(off, settings, device) -> None:
    q = layer(**settings).to(device)
    for shape in ((3, K), (K,), (2, 1, K), (0, K)):
        x = torch.randn(shape, device=device)
        with off():
            assert dispatch.straight(x) == _native.available()
            short = q(x)
        long = q(x)
        assert not dispatch.straight(x) and short.shape == (*shape[:-1], N)
        assert torch.equal(short, long)


def test_whoever_looks_on_sees_the_product(device) -> None:
    q, x = layer().to(device), torch.randn(3, K, device=device)
    with torch.no_grad():
        expected = q(x)
        with Seen() as seen:
            q(x)
        with torch.profiler.profile() as profile:
            q(x)
        assert seen.products == 1
        assert "mmq::gemm" in [event.key for event in profile.key_averages()]
        with Looks():
            assert not dispatch.straight(x)
        with torch.autocast(device, torch.bfloat16):
            assert not dispatch.straight(x) and q(x).dtype == torch.bfloat16
        traced = torch.jit.trace(q, x, check_trace=False)
        assert "mmq::gemm" in str(traced.graph)
        assert torch.equal(traced(x), expected)
        assert type(q(x.as_subclass(Labelled))) is Labelled
        assert torch.equal(torch.func.vmap(q)(x), expected)
        assert torch.equal(q(torch._neg_view(-x)), expected)
        with torch.autograd.forward_ad.dual_level():
            dual = q(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None


def test_gradients_flow_where_they_are_on() -> None:
    q, x = layer(), torch.randn(3, K, requires_grad=True)
    with torch.no_grad():
        assert not q(x).requires_grad
    q(x).sum().backward()
    assert x.grad is not None
    assert torch.func.grad(lambda x: q(x).sum())(x.detach()).shape == x.shape


def test_an_output_is_no_view_that_autograd_remembers() -> None:
    q = layer()
    with torch.no_grad():
        y = q(torch.randn(2, 3, K))
    y.add_(torch.ones(N, requires_grad=True))
    assert y.requires_grad


@needs_extension
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_call_like_the_last_is_not_checked_again(settings, monkeypatch) -> None:
    q, x, checked = layer(**settings), torch.randn(3, K), counted(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            q(x)
    assert len(checked) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda q, x: q(x[:2]),
        lambda q, x: q(x.double()),
        lambda q, x: q(x[:, :-1]),
        lambda q, x: q(x.bfloat16()),
        lambda q, x: q.to(torch.bfloat16)(x),
        lambda q, x: (setattr(q, "activation_bits", 8), q(x)),
        lambda q, x: (setattr(q, "activation", "relu"), q(x)),
        lambda q, x: (setattr(q, "bias", None), q(x)),
        lambda q, x: (setattr(q, "out_features", N + 16), q(x)),
        lambda q, x: (setattr(q.bias, "data", torch.zeros(N + 1)), q(x)),
        lambda q, x: (setattr(q, "scale_runtime", q.scale_runtime.clone()), q(x)),
        lambda q, x: (setattr(q.scale_runtime, "data", q.scale_runtime.data.float()), q(x)),
    ],
)
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_changed_is_checked(change, settings, monkeypatch) -> None:
    q, x, checked = layer(**settings), torch.randn(3, K), counted(monkeypatch)
    with torch.no_grad():
        q(x)
        try:
            change(q, x)
        except ValueError as error:
            assert "must be" in str(error)
    assert len(checked) == 2


def test_an_order_written_to_is_checked(monkeypatch) -> None:
    q, x, checked = layer(ordered=True), torch.randn(3, K), counted(monkeypatch)
    with torch.no_grad():
        first = q(x)
        q.perm.copy_(q.perm.flip(0))
        assert not torch.equal(q(x), first)
    assert len(checked) == 2


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets their number, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_extension
def test_again_takes_no_python(threads, monkeypatch) -> None:
    """On a CPU, whatever the shape and the number of threads, and wherever the tensors lie by then."""
    q = layer(bias=True, activation="gelu")
    with torch.no_grad():
        for shape in ((3, K), (K,), (2, 1, K), (0, K)):
            x = torch.randn(shape)
            expected = q(x)
            with monkeypatch.context() as without:
                for name in ("gemm", "gemm_integer"):
                    without.setattr(CpuBackend, name, None)
                assert torch.equal(q(x), expected) and q(x).shape == expected.shape
                for tensor in (q.weight_runtime, q.scale_runtime, q.zero_runtime, q.bias):
                    tensor.data = tensor.data.clone()
                assert torch.equal(q(x.clone()), expected)
                for count in (1, 2):
                    threads(count)
                    assert torch.equal(q(x), expected)
        q.activation_bits = 8
        rounded = q(x)
        monkeypatch.setattr(CpuBackend, "gemm_integer", None)
        assert torch.equal(q(x), rounded)


@needs_extension
def test_what_a_kernel_cannot_read_goes_the_long_way() -> None:
    q, x = layer(bias=True), torch.randn(4, K)
    with torch.no_grad():
        expected = q(x)
        assert torch.equal(q(x.t().contiguous().t()), expected)
        apart = torch.randn(4, 2 * K)
        apart[:, ::2] = x
        assert torch.equal(q(apart[:, ::2]), expected)
        spread = torch.zeros(N, 2)
        spread[:, 0] = q.bias
        q.bias.data = spread[:, 0]
        assert torch.equal(q(x), expected)
        q.bias.data = q.bias.data.half()
        assert torch.allclose(q(x), expected, atol=1e-2)
        assert torch.equal(q(x), q(x))


def test_the_environment_is_looked_at_each_time(monkeypatch) -> None:
    q, x = layer(), torch.randn(3, K)
    with torch.no_grad():
        expected = q(x)
        monkeypatch.setenv("MMQ_BACKEND", "nothing")
        with pytest.raises(ValueError, match="MMQ_BACKEND must be one of"):
            q(x)
        monkeypatch.delenv("MMQ_BACKEND")
        assert torch.equal(q(x), expected)
        if _native.available():
            monkeypatch.setenv("MMQ_CPU_ISA", "mmx")
            with pytest.raises(ValueError, match="MMQ_CPU_ISA must be one of"):
                q(x)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["copy", "pickle"])
def test_a_copy_remembers_nothing(copier) -> None:
    q, x = layer(), torch.randn(3, K)
    with torch.no_grad():
        expected = q(x)
        other = copier(q)
        assert repeated.last_call(other.weight_runtime) is None
        assert torch.equal(other(x), expected)


def test_what_is_wrong_is_still_refused() -> None:
    q, x = layer(), torch.randn(3, K)
    with torch.no_grad():
        q(x)
        with pytest.raises(ValueError, match=rf"x shape must be \[..., {K}\], got \[3, {K - 1}\]"):
            q(x[:, :-1])
        with pytest.raises(ValueError, match="x device must be cpu, got meta"):
            q(x.to("meta"))
        q.bias.data = torch.zeros(N - 1)
        with pytest.raises(ValueError, match=rf"bias shape must be \[{N}\], got \[{N - 1}\]"):
            q(x)


def test_a_layer_without_data_gives_shapes() -> None:
    assert layer().to("meta")(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)


def test_who_is_asked_for_serves() -> None:
    q, x = layer(), torch.randn(3, K)
    with torch.no_grad():
        q(x)
        with (
            ops.use_backend("cuda" if not torch.cuda.is_available() else "triton"),
            pytest.raises(RuntimeError, match="was asked for but cannot serve"),
        ):
            q(x)
        q(x)


@needs_extension
def test_the_memory_of_a_weight_goes_with_it() -> None:
    import gc
    import weakref

    q, x = layer(QuantSpec(3, -1)), torch.randn(3, K)
    with torch.no_grad():
        q(x)
    last = repeated.last_call(q.weight_runtime)
    assert last is not None
    tensors = (q.scale_runtime, q.zero_runtime, q.perm, q.weight_input_scale, q.bias)
    assert last.was(x, *tensors, q._numbers) and not last.was(x, *tensors, ())
    kept = weakref.ref(q.weight_runtime)
    gc.disable()
    try:
        del q
        assert kept() is None
    finally:
        gc.enable()
