"""Schemas, fakes, gradients, argument checks and choice of the public ops, on every backend that is here."""

import pytest
import torch
from torch.library import opcheck

from mmq_kernels import ops
from mmq_kernels.nn import QuantLinear
from mmq_kernels.ops.choice import forced_backend
from mmq_kernels.spec import BITS, QuantSpec

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "silu": torch.nn.functional.silu,
}


def layer(spec=None, n=24, k=40, **kwargs) -> QuantLinear:
    spec = spec or QuantSpec(4, 16)
    codes, scale, zero = ops.quantize_rtn(torch.randn(n, k), spec)
    return QuantLinear.from_codes(codes, scale, zero, spec, bias=torch.randn(n), **kwargs)


def gemm_arguments(x: torch.Tensor, q: QuantLinear, activation="none") -> list:
    spec = q.spec
    return [
        *(x, q.weight_runtime, q.scale_runtime, q.zero_runtime, q.perm, q.weight_input_scale, q.bias),
        *(spec.bits, spec.group_size, q.out_features, q.in_features, q.layout, activation),
    ]


def test_opcheck_passes_for_every_op(on) -> None:
    q = layer()
    x = torch.randn(3, 40, requires_grad=True)
    opcheck(torch.ops.mmq.gemm.default, gemm_arguments(x, q, "gelu"))
    opcheck(
        torch.ops.mmq.dequantize.default,
        [*gemm_arguments(x, q)[1:5], 4, 16, 24, 40, q.layout, torch.bfloat16],
    )
    codes = torch.randint(0, 8, (5, 33), dtype=torch.uint8)
    opcheck(torch.ops.mmq.pack.default, [codes, 3])
    opcheck(torch.ops.mmq.unpack.default, [ops.pack(codes, 3), 3, 33])
    weight = torch.randn(24, 40)
    opcheck(torch.ops.mmq.quantize_rtn.default, [weight, 4, 16, False, torch.float16])
    hinv = torch.eye(40).triu()
    opcheck(torch.ops.mmq.gptq_block.default, [weight, hinv, None, None, 4, 16, True, torch.float16])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_dense_layer(on, activation) -> None:
    q = layer(activation=activation)
    q.bias.requires_grad_(True)
    x = torch.randn(2, 3, 40, requires_grad=True)
    dense = ACTIVATIONS[activation](x @ q.dequantize().t() + q.bias)
    upstream = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, (x, q.bias), upstream)
    got = torch.autograd.grad(q(x), (x, q.bias), upstream)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_any_leading_dims_and_no_rows(on) -> None:
    q = layer()
    x = torch.randn(2, 3, 5, 40)
    y = q(x)
    assert y.shape == (2, 3, 5, 24)
    torch.testing.assert_close(y[1, 2], q(x[1, 2]), rtol=1e-5, atol=1e-5)
    assert q(x[0, 0, 0]).shape == (24,)
    assert q(torch.empty(0, 40)).shape == (0, 24)
    assert q(torch.empty(2, 0, 40)).shape == (2, 0, 24)


def test_non_contiguous_inputs(on) -> None:
    q = layer()
    x = torch.randn(40, 6)
    torch.testing.assert_close(q(x.t()), q(x.t().contiguous()), rtol=0, atol=0)


BAD_GEMM = [
    (0, torch.randn(3, 41), r"x shape must be \[\.\.\., 40\], got \[3, 41\]"),
    (0, torch.randn(3, 40).double(), "x dtype must be float16, bfloat16 or float32, got torch.float64"),
    (0, torch.randn(3, 40, device="meta"), r"x device must be (cpu|cuda:0|xpu:0), got meta"),
    (1, torch.zeros(3, 3, dtype=torch.int32), r"weight shape must be \[.*\], got \[3, 3\]"),
    (1, torch.zeros(3, 3), "weight dtype must be int32, got torch.float32"),
    (2, torch.zeros(1, 2), r"scale shape must be \[.*\], got \[1, 2\]"),
    (4, torch.zeros(40), "perm dtype must be int32, got torch.float32"),
    (5, torch.zeros(3), r"input_scale shape must be \[40\], got \[3\]"),
    (6, torch.zeros(3), r"bias shape must be \[24\], got \[3\]"),
    (7, 9, "bits must be an integer from 2 to 8, got 9"),
    (7, 1, "bits must be an integer from 2 to 8, got 1"),
    (8, 0, "group_size must be -1 or a positive multiple of 8, got 0"),
    (11, "tiles", "layout must be one of .*, got 'tiles'"),
    (12, "tanh", "activation must be one of none, relu, .*, got 'tanh'"),
]


@pytest.mark.parametrize(("position", "value", "message"), BAD_GEMM, ids=[message for *_, message in BAD_GEMM])
def test_bad_arguments_are_named(on, position, value, message) -> None:
    arguments = gemm_arguments(torch.randn(3, 40), layer())
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.mmq.gemm(*arguments)


def test_fake_refuses_what_the_kernel_refuses(on) -> None:
    arguments = gemm_arguments(torch.randn(3, 41), layer())
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match="x shape"),
    ):
        torch.ops.mmq.gemm(*arguments)


def test_codes_that_do_not_fit_are_refused(on) -> None:
    with pytest.raises(ValueError, match=r"codes must be below 2\*\*3, got 8"):
        ops.pack(torch.tensor([[7, 8]], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"words shape must be \[n, 1\] for k = 5, got \[1, 2\]"):
        ops.unpack(torch.zeros(1, 2, dtype=torch.int32), 3, 5)


def test_gptq_block_wants_scale_and_zero_together(on) -> None:
    weight, hinv = torch.randn(4, 8), torch.eye(8)
    with pytest.raises(ValueError, match="scale and zero must be both given or both None"):
        ops.gptq_block(weight, hinv, torch.ones(4, 1), None, QuantSpec(4))
    with pytest.raises(ValueError, match=r"hinv shape must be \[8, 8\], got \[7, 7\]"):
        ops.gptq_block(weight, torch.eye(7), None, None, QuantSpec(4))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_of_hard_groups_is_finite(on, bits, symmetric) -> None:
    """All-zero, constant, tiny, and one-sided groups: nothing divides by zero, nothing leaves the range."""
    rows = torch.stack(
        [
            torch.zeros(24),
            torch.full((24,), 3.0),
            torch.full((24,), -2.0),
            torch.full((24,), 1e-9),
            torch.rand(24),
        ]
    )
    spec = QuantSpec(bits, 8, symmetric)
    codes, scale, zero = ops.quantize_rtn(rows, spec)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    back = (codes.float() - zero.float().repeat_interleave(8, 1)) * scale.float().repeat_interleave(8, 1)
    assert torch.equal(back[0], torch.zeros(24))
    step = scale.float().repeat_interleave(8, 1)
    # A symmetric grid ends half a step below its largest weight.
    assert ((back - rows).abs() <= step * 0.51 + 1e-3 * rows.abs()).all()


def test_forced_backend_is_used_or_raises(monkeypatch) -> None:
    monkeypatch.setenv("MMQ_BACKEND", "reference")
    assert forced_backend() == "reference"
    assert ops.select("gemm", "cpu", layout="planes").backend == "reference"
    monkeypatch.setenv("MMQ_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"MMQ_BACKEND must be one of .*, got 'tpu'"):
        ops.select("gemm", "cpu")
    monkeypatch.delenv("MMQ_BACKEND")
    with pytest.raises(ValueError, match="backend must be one of"), ops.use_backend("tpu"):
        pass


def test_a_backend_that_cannot_serve_is_not_replaced() -> None:
    with (
        ops.use_backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' was asked for but cannot serve"),
    ):
        ops.select("gemm", "cuda", layout="cpu")
    assert ops.select("gemm", "cuda", layout="planes").backend == "reference"


def test_reference_serves_weights_of_any_layout() -> None:
    q = layer()
    x = torch.randn(7, 40)
    fast = q(x)
    with ops.use_backend("reference"):
        torch.testing.assert_close(q(x), fast, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gptq_block_takes_many_layers_at_once(backend) -> None:
    weight, factors = torch.randn(3, 5, 24), torch.stack([torch.rand(24, 24).triu() + torch.eye(24) for _ in range(3)])
    spec = QuantSpec(4, 8)
    with ops.use_backend(backend):
        together = ops.gptq_block(weight, factors, None, None, spec)
        given = ops.gptq_block(weight, factors, *together[2:], spec)
        for i in range(3):
            alone = ops.gptq_block(weight[i], factors[i], None, None, spec)
            assert all(torch.equal(part[i], one) for part, one in zip(together, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given[2:], together[2:], strict=True))
    with pytest.raises(ValueError, match=r"hinv shape must be \[3, 24, 24\], got \[24, 24\]"):
        ops.gptq_block(weight, factors[0], None, None, spec)
    with pytest.raises(ValueError, match=r"weight must be \[n, B\] or \[layers, n, B\], got \[24\]"):
        ops.gptq_block(weight[0, 0], factors[0], None, None, spec)


@pytest.mark.parametrize(("wrong", "named"), [(-1, "-1"), (40, "40")])
def test_a_column_order_out_of_range_is_refused(wrong, named) -> None:
    q = layer()
    perm = torch.arange(40, dtype=torch.int32)
    perm[7] = wrong
    arguments = (q.weight_runtime, q.scale_runtime, q.zero_runtime, perm, None, None)
    numbers = (q.spec.bits, q.spec.group_size, q.out_features, 40, q.layout)
    with pytest.raises(ValueError, match=f"perm must be column numbers from 0 to 39, got {named}"):
        ops.gemm(torch.randn(2, 40), *arguments, *numbers)
    perm[7] = 7
    ops.gemm(torch.randn(2, 40), *arguments, *numbers)
    perm[7] = wrong  # after the weight was found right
    with pytest.raises(ValueError, match=f"perm must be column numbers from 0 to 39, got {named}"):
        ops.gemm(torch.randn(2, 40), *arguments, *numbers)


def test_a_known_weight_is_checked_again_when_its_company_changes() -> None:
    """Checks are remembered by the weight's tensor: another scale, or other numbers, must not slip through."""
    q = layer()
    x, numbers = torch.randn(2, 40), (q.spec.bits, q.spec.group_size, q.out_features, 40, q.layout)
    good = (q.weight_runtime, q.scale_runtime, q.zero_runtime, None, None, None)
    ops.gemm(x, *good, *numbers)
    with pytest.raises(ValueError, match="scale shape must be"):
        ops.gemm(x, good[0], good[1][:, :1].contiguous(), *good[2:], *numbers)
    with pytest.raises(ValueError, match="weight shape must be"):
        ops.gemm(x, *good, *numbers[:2], 10**6, *numbers[3:])
    ops.gemm(x, *good, *numbers)
