"""Float activations as fixed-point digits (csrc/cpu/fixed.inl): exact where taken, refused where they would lose."""

import pytest
import torch
from cases import CPU, ISAS, NO_EXTENSION, Case, linear_bound

from mmq_kernels.spec import BITS, QuantSpec

pytestmark = pytest.mark.skipif(not ISAS, reason=NO_EXTENSION)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROW = [bits for bits in BITS if bits < 8]
needs_avx2 = pytest.mark.skipif("avx2" not in ISAS, reason="this CPU has no AVX2")


@needs_avx2
@pytest.mark.parametrize("bits", NARROW)
def test_what_cancels_leaves_every_bit_of_the_rest(bits) -> None:
    """fp32 sums would have rounded the rest away beside 2^20 while it was there."""
    case = Case(QuantSpec(bits, -1, True), 1, 256, torch.float32, power_of_two=True)
    code = case.codes[0].bincount().argmax()
    first, *_, last = (case.codes[0] == code).nonzero()[:, 0].tolist()
    for _ in range(10):
        x = torch.randint(-7, 8, (1, 256)) * 2.0**-3
        x[0, first], x[0, last] = 2.0**20, -(2.0**20)
        assert torch.equal(case.gemm(x, isa="avx2"), (x.double() @ case.dense.t()).float())


@needs_avx2
@pytest.mark.parametrize("bits", NARROW)
@pytest.mark.parametrize("group, m", [(128, 1), (128, 2), (40, 3), (8, 5), (-1, 7), (72, 70)])
def test_columns_apart_are_not_lost(group, m, bits) -> None:
    """A few numbers of some tokens are too large, or too fine, for two digits of the others in their segments."""
    case = Case(QuantSpec(bits, group, bits % 2 == 0), 50, 400, torch.float32)
    for share in (0, 1, 4, 24):
        x = torch.randn(m, 400).clamp(0.05, 4) * torch.randint(0, 2, (m, 400)).mul(2).sub(1)
        for row in x[:: 1 + m // 3]:
            columns = torch.randperm(400)[:share]
            row[columns] *= 2.0 ** torch.randint(-60, 60, (share,))
        x = x.bfloat16()
        expected, bound = linear_bound(case, x, None, "none")
        assert ((case.gemm(x, isa="avx2").double() - expected).abs() <= bound).all(), share


@needs_avx2
@pytest.mark.parametrize("bits", [bits for bits in NARROW if bits < 7])
def test_a_number_apart_is_multiplied_as_it_is(bits) -> None:
    """Each column once, tiny and huge, beside numbers that two digits hold."""
    case = Case(QuantSpec(bits, 24, True), 20, 72, torch.float32, power_of_two=True)
    for number in (2.0**-120, -(2.0**100)):
        for column in range(72):
            x = torch.zeros(3, 72)
            x[1, column], x[0] = number, 1
            y = case.gemm(x.bfloat16(), isa="avx2")
            assert torch.equal(y[1], (number * case.dense[:, column]).bfloat16()), column
            x[1] += torch.arange(72) == (column + 1) % 24 + column // 24 * 24
            expected, bound = linear_bound(case, x.bfloat16(), None, "none")
            assert ((case.gemm(x.bfloat16(), isa="avx2").double() - expected).abs() <= bound).all(), column


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_seen_beside_any_that_meet_a_weight_of_zero(bits, dtype, isa) -> None:
    """Large ones stand in different columns modulo 16: what digits lose is judged by sums of every 16th."""
    case = Case(QuantSpec(bits, -1, True), 1, 1500, torch.float32)
    zeros = (case.codes[0] == 2 ** (bits - 1)).nonzero()[:, 0]
    zeros = torch.stack([zeros[zeros % 16 == lane][0] for lane in set((zeros % 16).tolist())])[:5]
    most = 15 if dtype == torch.float16 else 60
    for m in (1, 2):
        for exponent in range(0, most, 3):
            x = torch.randn(m, 1500).to(dtype)
            x[0, zeros] = 2.0**exponent
            expected, bound = linear_bound(case, x, None, "none")
            assert ((case.gemm(x, isa=isa).double() - expected).abs() <= bound).all(), (m, exponent)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_lost_is_small_beside_what_lost_it(bits, dtype, isa) -> None:
    """Whatever the others meet: here all that meet weights of zero are large, and so hide how small the rest is."""
    case = Case(QuantSpec(bits, -1, True), 1, 1500, torch.float32)
    zeros = case.codes[0] == 2 ** (bits - 1)
    for exponent in range(0, 15 if dtype == torch.float16 else 60, 3):
        x = torch.randn(1, 1500)
        x[0, zeros] *= 2.0**exponent
        x = x.to(dtype)
        expected = x.double() @ case.dense.t()
        size = x.double().abs() @ case.dense.abs().t()
        rounded = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
        bound = 2.0**-16 * size + rounded * expected.abs()
        assert ((case.gemm(x, isa=isa).double() - expected).abs() <= bound).all(), exponent


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_every_size_in_one_token(bits, dtype, isa) -> None:
    least = -7 if dtype == torch.float16 else -30
    for group in (8, 40, 128, -1):
        case = Case(QuantSpec(bits, group), 40, 328, torch.float16)
        for m in (1, 2):
            x = (torch.randn(m, 328) * 2.0 ** torch.randint(least, -least + 1, (m, 328))).to(dtype)
            expected, bound = linear_bound(case, x, None, "none")
            assert ((case.gemm(x, isa=isa).double() - expected).abs() <= bound).all(), (group, m)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if "bf16" not in isa])
@pytest.mark.parametrize("dtype, ends", [(torch.float32, (-146, 100)), (torch.bfloat16, (-130, 100))])
def test_the_smallest_and_largest_of_fp32_are_exact(isa, dtype, ends) -> None:
    """Terms of bf16 lose what is below 2^-126: those kernels are left out."""
    case = Case(QuantSpec(4, 32, True), 20, 96, torch.float32, power_of_two=True)
    for end in (*ends, 0):
        x = (torch.randint(-3, 4, (2, 96)) * 2.0**end).to(dtype)
        for rows in (x[:1], x):
            assert torch.equal(case.gemm(rows, isa=isa), (rows.double() @ case.dense.t()).to(dtype)), end


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_zeros_is_worth_its_bias(isa, dtype) -> None:
    case, bias = Case(QuantSpec(3, 16), 33, 50, torch.float16), torch.randn(33).to(dtype)
    assert torch.equal(case.gemm(torch.zeros(1, 50, dtype=dtype), bias, isa=isa)[0], bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [-126 * 2**16 - 128 * 2**8 - 128, 2**23 - 1, -(2**23) + 1])
def test_the_largest_sums_there_are_do_not_overflow(value, bits, isa) -> None:
    """The first number's digits are as low as they get. fp32 sums of 256 equal terms are rounded by 2^-16 at most."""
    case = Case(QuantSpec(bits, 256), 20, 512, torch.float32, power_of_two=True, code=2**bits - 1)
    x = torch.full((1, 512), float(value))
    expected = x.double() @ case.dense.t()
    magnitude = x.double().abs() @ case.magnitude.t()
    assert ((case.gemm(x, isa=isa).double() - expected).abs() <= 2**-16 * magnitude).all()


@needs_avx2
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_refused_token_takes_the_other_along(value) -> None:
    """Both tokens go by fp32 then, as they would without digits: an infinity stays one, the other token is finite."""
    case, x = Case(QuantSpec(4, 32, True), 20, 64, torch.float16), torch.randn(2, 64).bfloat16()
    plain = CPU.gemm(x[1:], case.runtime, None, case.spec, case.n, "cpu", "none", isa="avx2")
    x[0, 7] = value
    y = case.gemm(x, isa="avx2")
    column = case.dense[:, 7]
    if value != value:
        assert y[0].isnan().all()
    else:
        assert torch.equal(y[0][column != 0], (column[column != 0].sign() * value).bfloat16())
    torch.testing.assert_close(y[1:], plain)
