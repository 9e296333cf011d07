"""Which kernel serves a call: what each costs decides, without a GPU, from what `torch.cuda` would say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmq_kernels import backends, ops
from mmq_kernels.backends import Call, backend, costs, cuda, triton
from mmq_kernels.nn import QuantLinear
from mmq_kernels.ops import choice
from mmq_kernels.spec import BITS, QuantSpec

GPU = "Imaginary 3000"


@pytest.fixture(autouse=True)
def _forgetful():
    """Decisions are remembered as long as a process runs; here the machine changes under way."""
    choice._decide.cache_clear()
    yield
    choice._decide.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of compute capability 9.0, the extension and Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cuda.CudaBackend, "why_unavailable", lambda self: None)
    monkeypatch.setattr(triton.TritonBackend, "why_unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "_gpu_name", lambda device: GPU)


def crossover(low: int, high: int, **call) -> int:
    """Fewest tokens that are dequantized first."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if choose(middle, **call).kernel == "dense" else (middle, high)
    return high


def choose(m: int | None, dtype=torch.float16, spec: QuantSpec | None = None, **call) -> ops.Choice:
    return ops.select(
        "gemm",
        "cuda:0",
        spec=spec or QuantSpec(4, 128),
        dtype=dtype,
        layout="cuda",
        m=m,
        **{"n": 1024, "k": 4096, **call},
    )


def test_few_tokens_are_packed_and_many_dense(gpu) -> None:
    for m, kernel in ((None, "packed"), (1, "packed"), (64, "packed"), (8192, "dense")):
        chosen = choose(m)
        assert (chosen.backend, chosen.kernel) == ("cuda", kernel)
        assert "estimated, measured on no such machine" in chosen.reason
    assert str(choose(4096)).startswith("cuda/dense: m = 4096, cuda/dense ")
    for n in (1024, 8192):
        assert 600 < crossover(1, 8192, n=n, k=8192) < 1200


def test_measured_rates_name_their_gpu_and_move_the_crossover(gpu, monkeypatch) -> None:
    before = crossover(1, 8192, n=8192, k=8192)
    choice._decide.cache_clear()
    slow = dict(costs.GPU.kernels)
    slow["cuda/packed"] = replace(slow["cuda/packed"], matmul=slow["cuda/packed"].matmul / 2)
    measured = replace(costs.GPU, measured_on=GPU, kernels=slow)
    monkeypatch.setattr(costs, "MEASURED", (replace(costs.GPU, measured_on="Another"), measured))
    assert crossover(1, 8192, n=8192, k=8192) < before / 2
    assert f"measured on {GPU}" in choose(64).reason


def test_the_layout_is_that_of_the_cheapest_backend(gpu, monkeypatch) -> None:
    assert ops.select("prepack", "cuda:0", spec=QuantSpec(4, 128), k=256).backend == "cuda"
    choice._decide.cache_clear()
    kernels = dict(costs.GPU.kernels)
    kernels["cuda/packed"] = replace(kernels["cuda/packed"], bandwidth=0.1)
    monkeypatch.setattr(costs, "MEASURED", (replace(costs.GPU, measured_on=GPU, kernels=kernels),))
    chosen = ops.select("prepack", "cuda:0", spec=QuantSpec(4, 128), k=256, n=8192)
    assert chosen.backend == "triton"
    prices = chosen.reason.split("(")[0]
    assert prices.index("triton ") < prices.index("cuda ") < prices.index("reference ")


def test_every_kernel_has_a_price() -> None:
    for name, table in (("cuda", costs.GPU), ("triton", costs.GPU), ("cpu", costs.CPU), ("triton", costs.CPU)):
        for kernel in backend(name).kernels or ("",):
            label = f"{name}/{kernel}" if kernel else name
            for op in ("gemm", "prepack", "dequantize", "pack", "unpack", "quantize_rtn", "gptq_block"):
                call = Call(op, torch.device("cpu"), spec=QuantSpec(4, 128), m=1, n=4096, k=4096)
                assert 0 < table.seconds(label, call) < table.seconds("reference", call) or table is costs.CPU


def test_more_tokens_never_cost_less_and_fewer_bits_never_more() -> None:
    for table in (costs.GPU, costs.CPU):
        for kernel in table.kernels:
            first = Call("gemm", torch.device("cpu"), spec=QuantSpec(4, 128), m=1, n=512, k=512)
            calls = [replace(first, m=m) for m in range(999)]
            prices = [table.seconds(kernel, call) for call in calls]
            assert prices == sorted(prices)
            widths = [table.seconds(kernel, replace(first, spec=QuantSpec(bits, 128))) for bits in BITS]
            assert widths == sorted(widths)


def test_fp32_goes_the_dense_way(gpu) -> None:
    assert choose(1, torch.float32).kernel == "dense"
    with (
        ops.use_backend("cuda/packed"),
        pytest.raises(RuntimeError, match=r"'cuda/packed' was asked for but .*: torch.float32 has no packed kernel"),
    ):
        choose(1, torch.float32)


def test_a_kernel_can_be_asked_for(gpu, monkeypatch) -> None:
    with ops.use_backend("cuda/dense"):
        assert choose(1).kernel == "dense" and "asked for" in choose(1).reason
    monkeypatch.setenv("MMQ_BACKEND", "cuda/packed")
    assert choose(4096).kernel == "packed"
    monkeypatch.setenv("MMQ_BACKEND", "cuda/fast")
    with pytest.raises(ValueError, match="MMQ_BACKEND cuda has kernels packed, dense, got 'cuda/fast'"):
        choose(1)
    with pytest.raises(ValueError, match=r"backend reference has kernels \(only one\), got 'reference/packed'"):
        ops.use_backend("reference/packed").__enter__()


def test_what_cuda_does_not_serve_is_said(gpu, monkeypatch) -> None:
    odd = ops.select("prepack", "cuda:0", spec=QuantSpec(4, 24), k=256)
    assert odd.backend == "triton" and "cuda: group_size is 24, not a multiple of 16" in odd.reason
    assert ops.select("prepack", "cuda:0", spec=QuantSpec(4, 24), k=20).backend == "cuda"  # one group: the whole row
    assert ops.select("gptq_block", "cuda:0", spec=QuantSpec(4, 8)).backend == "cuda"
    choice._decide.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = ops.select("prepack", "cuda:0", spec=QuantSpec(4, 32), k=256)
    assert old.backend == "triton" and "cuda: compute capability is 7.5, below 8.0" in old.reason
    weight = {"spec": QuantSpec(4, 32), "layout": "planes", "m": 1, "n": 64, "k": 256}
    assert ops.select("gemm", "cuda:0", dtype=torch.float16, **weight).backend == "triton"
    without = ops.select("gemm", "cuda:0", dtype=torch.bfloat16, **weight)
    assert without.backend == "reference" and "below 8.0, which bfloat16 needs" in without.reason
    choice._decide.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    older = ops.select("prepack", "cuda:0", spec=QuantSpec(4, 32), k=256)
    assert older.backend == "reference" and "triton: compute capability is 7.0, below 7.5" in older.reason
    with (
        ops.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"'cuda' was asked for but cannot serve mmq.prepack"),
    ):
        ops.select("prepack", "cuda:0", spec=QuantSpec(4, 32), k=256)


def test_no_silent_move_to_another_device() -> None:
    chosen = ops.select("gemm", "cpu", spec=QuantSpec(4, 128), layout="planes", m=1)
    assert chosen.backend == "reference" and "cuda: " in chosen.reason and "cpu: " in chosen.reason


def test_more_words_than_triton_counts_are_refused(gpu) -> None:
    weight = {"spec": QuantSpec(8, 24), "n": 2**17, "k": 2**16}
    assert ops.select("prepack", "cuda:0", **weight).backend == "reference"
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="2147483648 words, more than the 2147483647"):
        ops.select("prepack", "cuda:0", **weight)


def test_a_backend_is_one_class_and_one_line(monkeypatch, tmp_path) -> None:
    """A class in a file of its own and its entry in `backends._WHERE`: layers are then made for it and served by it."""
    (tmp_path / "mine.py").write_text(
        "from mmq_kernels.backends.reference import ReferenceBackend\n"
        "class Mine(ReferenceBackend):\n"
        "    name, layout, served = 'mine', 'mine', 0\n"
        "    def gemm(self, *arguments, **others):\n"
        "        Mine.served += 1\n"
        "        return super().gemm(*arguments, **others)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    where = {"mine": "mine:Mine", **backends._WHERE}
    monkeypatch.setattr(backends, "_WHERE", where)
    monkeypatch.setattr(backends, "NAMES", tuple(where))
    with ops.use_backend("mine"):
        codes, scale, zero = ops.quantize_rtn(torch.randn(5, 40), QuantSpec(4, 8))
        layer = QuantLinear.from_codes(codes, scale, zero, QuantSpec(4, 8))
        x = torch.randn(2, 40)
        torch.testing.assert_close(layer(x), x @ layer.dequantize().t())
    assert layer.layout == "mine" and backend("mine").served == 1
    assert "mine" in ops.explain_all("cpu") and ops.select("gemm", "cpu", layout="mine").backend in (
        "mine",
        "reference",
    )


def test_a_call_can_be_pinned(gpu) -> None:
    chosen = ops.select("gemm", "cuda:0", spec=QuantSpec(4, 128), layout="cuda", m=1, n=64, k=256, forced="cuda/dense")
    assert (chosen.backend, chosen.kernel) == ("cuda", "dense")
    with ops.use_backend("reference"):
        assert ops.select("gemm", "cpu", layout="planes", forced="reference").backend == "reference"
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fast'"):
        ops.select("gemm", "cpu", forced="fast")


def test_the_interpreter_is_never_chosen_unless_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton.TritonBackend, "why_unavailable", lambda self: None)
    chosen = ops.select("prepack", "cpu", spec=QuantSpec(4, 32), n=64, k=256)
    assert chosen.backend in ("cpu", "reference")
    with ops.use_backend("triton"):
        assert ops.select("prepack", "cpu", spec=QuantSpec(4, 32), k=256).backend == "triton"
        assert ops.select("prepack", "meta", spec=QuantSpec(4, 32), k=256).backend == "triton"
