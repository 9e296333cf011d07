"""The public ops on every backend, against fp64 and plain loops that share no code with the package."""

from __future__ import annotations

import pytest
import torch
from cases import ACTIVATIONS, Case, linear_bound, sample
from torch import Tensor

from mmq_kernels import backends, ops
from mmq_kernels.spec import BITS, QuantSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
M, N, K = (0, 1, 5, 17, 40, 70), (1, 5, 33, 70), (8, 40, 72, 200, 296)
GROUPS = (-1, 8, 24, 32, 64, 128)
YES_NO = (False, True)
AXES = (M, N, K, GROUPS, YES_NO, DTYPES, DTYPES, tuple(ACTIVATIONS), YES_NO, YES_NO, YES_NO)


def drawn(on, spec: QuantSpec, n: int, k: int, scale_dtype: torch.dtype, power_of_two: bool = False) -> tuple:
    """A weight in the layout that the backend under test chooses, and that layout's name."""
    layout = backends.backend(ops.select("prepack", on.device, spec=spec, k=k).backend).layout
    with torch.device("cpu"):
        case = Case(spec, n, k, scale_dtype, power_of_two, backends.backend_of_layout(layout), on.device)
    return case, layout


def gemm(on, drawn_case: tuple, x: Tensor, bias=None, activation="none", perm=None, input_scale=None) -> Tensor:
    case, layout = drawn_case
    spec = case.spec
    extra = [None if t is None else t.to(on.device) for t in (perm, input_scale, bias)]
    return ops.gemm(
        x.to(on.device), *case.runtime, *extra, spec.bits, spec.group_size, case.n, case.k, layout, activation
    ).cpu()


def prepared(x: Tensor, perm: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """``(x / input_scale)[:, perm]``, the quotient rounded to x's dtype."""
    if input_scale is not None:
        x = (x.double() / input_scale.to(x.dtype).double()).to(x.dtype)
    return x if perm is None else x[:, perm.long()]


@pytest.mark.parametrize("bits", BITS)
def test_small_integers_are_exact(bits, on) -> None:
    for m, n, k, group, symmetric, dtype, scale_dtype, _, with_bias, ordered, scaled in sample(AXES, bits, 20):
        spec = QuantSpec(bits, group, symmetric)
        if not on.takes(spec, k):
            continue
        case = drawn(on, spec, n, k, scale_dtype, power_of_two=True)
        with torch.device("cpu"):
            x = 2 * torch.randint(-2, 3, (m, k)).to(dtype)
            bias = torch.randint(-4, 5, (n,)).to(dtype) if with_bias else None
            perm = torch.randperm(k).int() if ordered else None
            input_scale = 2.0 ** torch.randint(-1, 2, (k,)) if scaled else None
            expected = prepared(x, perm, input_scale).double() @ case[0].dense.t() + (bias.double() if with_bias else 0)
        got = gemm(on, case, x, bias, perm=perm, input_scale=input_scale)
        assert got.dtype == dtype and got.shape == (m, n)
        assert torch.equal(got, expected.to(dtype)), (m, n, k, spec, dtype, scale_dtype, ordered, scaled)


@pytest.mark.parametrize("bits", BITS)
def test_random_inputs_are_as_near_as_dequantize_and_matmul(bits, on) -> None:
    axes = sample(AXES, 10 + bits, 24)
    for m, n, k, group, symmetric, dtype, scale_dtype, activation, with_bias, ordered, scaled in axes:
        spec = QuantSpec(bits, group, symmetric)
        if not on.takes(spec, k):
            continue
        case = drawn(on, spec, n, k, scale_dtype)
        with torch.device("cpu"):
            x = torch.randn(m, k).to(dtype)
            bias = torch.randn(n).to(dtype) if with_bias else None
            perm = torch.randperm(k).int() if ordered else None
            input_scale = (torch.rand(k) + 0.5).to(dtype) if scaled else None
            expected, bound = linear_bound(
                case[0], prepared(x, perm, input_scale), bias, activation, on.rounds_weights(spec, m, k)
            )
        got = gemm(on, case, x, bias, activation, perm, input_scale).double()
        assert ((got - expected).abs() <= bound).all(), (m, n, k, spec, dtype, scale_dtype, activation)


@pytest.mark.parametrize("m", [1, 9])
def test_long_rows_with_a_ragged_last_group(m, on) -> None:
    for bits, n, k in ((4, 1, 3420), (3, 9, 4304), (8, 65, 3420)):
        case = drawn(on, QuantSpec(bits, 128), n, k, torch.float16)
        dtype = torch.float16
        with torch.device("cpu"):
            x = torch.randn(m, k).to(dtype)
            expected, bound = linear_bound(case[0], x, None, "none")
        assert ((gemm(on, case, x).double() - expected).abs() <= bound).all()


def test_rows_that_are_not_aligned(on) -> None:
    case = drawn(on, QuantSpec(4, 32), 24, 64, torch.float16)
    for offset in (1, 4, 8):
        with torch.device("cpu"):
            flat = torch.randn(5 * 64 + 8)
            expected, bound = linear_bound(case[0], flat[offset : offset + 320].view(5, 64).half(), None, "none")
        x = flat.to(on.device).half()[offset : offset + 320].view(5, 64)
        got = ops.gemm(x, *case[0].runtime, None, None, None, 4, 32, 24, 64, case[1])
        assert ((got.cpu().double() - expected).abs() <= bound).all()


def test_infinite_and_missing_values_stay_in_their_row(on) -> None:
    case = drawn(on, QuantSpec(4, 32, True), 20, 64, torch.float16)
    for m in (3, 20, 40):
        with torch.device("cpu"):
            x = torch.randn(m, 64).half()
        x[1, 5], x[0, 3] = float("nan"), float("inf")
        y = gemm(on, case, x)
        assert y[1].isnan().all() and y[2:].isfinite().all() and not y[0].isfinite().any()


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_exact(bits, on) -> None:
    for _, n, k, group, symmetric, dtype, scale_dtype, _, ordered, *_ in sample(AXES, 20 + bits, 16):
        spec = QuantSpec(bits, group, symmetric)
        if not on.takes(spec, k):
            continue
        case, layout = drawn(on, spec, n, k, scale_dtype)
        expected = case.dense.float().to(dtype)
        perm = None
        if ordered:
            with torch.device("cpu"):
                perm = torch.randperm(k)
            expected = expected[:, torch.argsort(perm)]
            perm = perm.int().to(on.device)
        got = ops.dequantize(*case.runtime, perm, bits, group, n, k, layout, dtype)
        # Scale times an integer below 2^9: exact in fp64, so this is fp32 rounded once and then to dtype.
        assert torch.equal(got.cpu(), expected), (n, k, spec, dtype, scale_dtype)


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack_are_inverses_and_dense(bits, on) -> None:
    for n, k in ((1, 1), (3, 5), (5, 33), (2, 257)):
        codes = torch.arange(n * k).view(n, k).remainder(2**bits).to(torch.uint8)
        words = ops.pack(codes, bits)
        stream = [sum(int(code) << (i * bits) for i, code in enumerate(row)) for row in codes.tolist()]
        expected = [[(row >> (32 * j)) & 0xFFFFFFFF for j in range(-(-k * bits // 32))] for row in stream]
        assert [[word & 0xFFFFFFFF for word in row] for row in words.tolist()] == expected
        assert torch.equal(ops.unpack(words, bits, k), codes)


def plain_grid(part: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Min-max grid of columns fp32 ``[n, length]``."""
    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if spec.symmetric else high - low
    scale = (span / (2**spec.bits - 1)).to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny)
    scale[span == 0] = 1
    zero = (-low / scale.float()).round().clamp(0, 2**spec.bits - 1)
    return scale, torch.full_like(zero, 2.0 ** (spec.bits - 1)) if spec.symmetric else zero


def plain_gptq(
    weight: Tensor, hinv: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, spread: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 1 of GPTQ, column by column; without `spread` it is rounding to nearest."""
    columns = weight.shape[1]
    weight, length = weight.clone(), columns if spec.group_size == -1 else spec.group_size
    codes, errors, scales, zeros = torch.empty_like(weight), torch.empty_like(weight), [], []
    for j in range(columns):
        if j % length == 0:
            scale, zero = plain_grid(weight[:, j : j + length], spec, scale_dtype)
            scales.append(scale)
            zeros.append(zero)
        codes[:, j] = ((weight[:, j] / scale.float()).round() + zero).clamp(0, 2**spec.bits - 1)
        errors[:, j] = (weight[:, j] - scale.float() * (codes[:, j] - zero)) / hinv[j, j]
        if spread:
            weight[:, j + 1 :] -= errors[:, j, None] * hinv[j, j + 1 :]
    return codes.to(torch.uint8), errors, torch.stack(scales, 1), torch.stack(zeros, 1).to(torch.uint8)


def hard_weight(n: int, k: int) -> Tensor:
    """Random rows of several sizes, with groups that are zero, constant, one-sided, tiny and huge."""
    weight = torch.randn(n, k, device="cpu") * 10.0 ** torch.randint(-3, 3, (n, 1), device="cpu")
    weight[0], weight[1, : k // 2], weight[4], weight[5, 0] = 0, 3.0, 1e-9, 6e4
    weight[2], weight[3] = weight[2].abs(), -weight[3].abs()
    return weight


def inverse_factor(columns: int) -> Tensor:
    """Upper Cholesky factor of the inverse of a random Hessian."""
    x = torch.randn(4 * columns, columns, dtype=torch.float64, device="cpu")
    hessian = x.t() @ x + 0.01 * columns * torch.eye(columns, dtype=torch.float64, device="cpu")
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", YES_NO)
def test_rtn_is_the_plain_formula(bits, symmetric, on) -> None:
    for i, (group, k) in enumerate(((-1, 300), (8, 41), (24, 72), (128, 130))):
        spec, dtype, scale_dtype = QuantSpec(bits, group, symmetric), DTYPES[i % 3], DTYPES[(i + bits) % 3]
        weight = hard_weight(19, k).to(dtype)
        codes, _, scale, zero = plain_gptq(weight.float(), torch.eye(k, device="cpu"), spec, scale_dtype, spread=False)
        got = ops.quantize_rtn(weight.to(on.device), spec, scale_dtype)
        for found, expected in zip(got, (codes, scale, zero), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found.cpu(), expected), (spec, dtype, scale_dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", YES_NO)
def test_gptq_block_is_the_plain_loop(bits, symmetric, on) -> None:
    for group, columns, n in ((-1, 40, 19), (8, 21, 7), (24, 48, 9)):
        spec, scale_dtype = QuantSpec(bits, group, symmetric), DTYPES[(bits + columns) % 3]
        weight, hinv = hard_weight(n, columns), inverse_factor(columns)
        expected = plain_gptq(weight, hinv, spec, scale_dtype)
        moved = weight.to(on.device), hinv.to(on.device)
        got = ops.gptq_block(*moved, None, None, spec, scale_dtype)
        again = ops.gptq_block(*moved, *got[2:], spec, scale_dtype)
        for found, twice, wanted in zip(got, again, expected, strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found.cpu(), wanted), spec
            assert torch.equal(found, twice)


def test_gptq_of_views_and_of_many_layers(on) -> None:
    spec = QuantSpec(4, 8)
    weight = torch.stack([hard_weight(9, 40) for _ in range(3)])
    hinv = torch.stack([inverse_factor(40) for _ in range(3)])
    columns = slice(8, 32)
    got = ops.gptq_block(
        weight.to(on.device)[..., columns], hinv.to(on.device)[..., columns, columns], None, None, spec
    )
    for i in range(3):
        expected = plain_gptq(weight[i, :, columns], hinv[i, columns, columns], spec, torch.float16)
        assert all(torch.equal(part[i].cpu(), one) for part, one in zip(got, expected, strict=True))


@pytest.mark.parametrize("group", [-1, 32, 128, 200])
def test_gptq_of_a_wide_block(group, on) -> None:
    """More columns than one launch takes are joined by matrix products: almost all codes equal, and no worse."""
    spec, hinv = QuantSpec(4, group), inverse_factor(200)
    weight = torch.randn(24, 200, device="cpu")
    expected = plain_gptq(weight, hinv, spec, torch.float16)
    got = [part.cpu() for part in ops.gptq_block(weight.to(on.device), hinv.to(on.device), None, None, spec)]
    assert [part.shape for part in got] == [part.shape for part in expected]
    assert (got[0] == expected[0]).float().mean() >= 0.999
    hessian, length = torch.linalg.inv(hinv.t() @ hinv), 200 if group == -1 else group
    lost = []
    for codes, _, scale, zero in (got, expected):
        wide = [part.float().repeat_interleave(length, 1)[:, :200] for part in (scale, zero)]
        difference = weight - wide[0] * (codes.float() - wide[1])
        lost.append(float(((difference @ hessian) * difference).sum()))
    assert lost[0] <= 1.001 * lost[1]


def test_the_same_input_gives_the_same_bits(on) -> None:
    case = drawn(on, QuantSpec(3, 32), 70, 1024, torch.float16)
    for m in (1, 20):
        with torch.device("cpu"):
            x = torch.randn(m, 1024).half()
        first = gemm(on, case, x)
        assert all(torch.equal(first, gemm(on, case, x)) for _ in range(3))
