"""gemm and dequantize of the compiled backend against fp64, on every instruction set this machine can run."""

import pytest
import torch
from cases import ACTIVATIONS, CPU, ISAS, NO_EXTENSION, Case, linear_bound, sample

from mmq_kernels import _native
from mmq_kernels.spec import BITS, QuantSpec

pytestmark = pytest.mark.skipif(not ISAS, reason=NO_EXTENSION)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = (-1, 8, 32, 40, 64, 128)
M, N, K = (0, 1, 2, 4, 5, 8, 9, 17, 257), (1, 5, 16, 33, 130), (8, 40, 70, 72, 100, 101, 3420)
AXES = (M, N, K, GROUPS, (False, True), DTYPES, DTYPES, tuple(ACTIVATIONS), (False, True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_small_integers_are_exact(bits, isa) -> None:
    for m, n, k, group, symmetric, dtype, scale_dtype, _, with_bias in sample(AXES, bits, 24):
        case = Case(QuantSpec(bits, group, symmetric), n, k, scale_dtype, power_of_two=True)
        x = torch.randint(-2, 3, (m, k)).to(dtype)
        bias = torch.randint(-4, 5, (n,)).to(dtype) if with_bias else None
        expected = x.double() @ case.dense.t() + (bias.double() if with_bias else 0)
        got = case.gemm(x, bias, isa=isa)
        assert got.dtype == dtype and got.shape == (m, n)
        assert torch.equal(got, expected.to(dtype)), (m, n, k, case.spec, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_random_inputs_are_as_near_as_dequantize_and_matmul(bits, isa) -> None:
    for m, n, k, group, symmetric, dtype, scale_dtype, activation, with_bias in sample(AXES, 10 + bits, 30):
        case = Case(QuantSpec(bits, group, symmetric), n, k, scale_dtype)
        x = torch.randn(m, k).to(dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        expected, bound = linear_bound(case, x, bias, activation)
        got = case.gemm(x, bias, activation, isa)
        assert ((got.double() - expected).abs() <= bound).all(), (m, n, k, case.spec, dtype, activation)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_exact(bits, isa) -> None:
    for _, n, k, group, symmetric, dtype, scale_dtype, *_ in sample(AXES, 20 + bits, 20):
        case = Case(QuantSpec(bits, group, symmetric), n, k, scale_dtype)
        got = CPU.dequantize(case.runtime, case.spec, n, k, "cpu", dtype, isa)
        # Scale times an integer below 2^9: exact in fp64, so this is fp32 rounded once and then to dtype.
        assert torch.equal(got, case.dense.float().to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits, group, k", [(2, 40, 70), (4, 8, 104), (5, 32, 71), (8, 24, 101)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_tokens_is_exact(isa, bits, group, k, dtype) -> None:
    """Tokens come in groups of many sizes, by tiles and by panels, and groups of columns end within units."""
    case = Case(QuantSpec(bits, group), 276, k, torch.float16, power_of_two=True)
    x = torch.randint(-2, 3, (60, k)).to(dtype)
    expected = (x.double() @ case.dense.t()).to(dtype)
    for m in range(1, 61):
        assert torch.equal(case.gemm(x[:m], isa=isa), expected[:m]), m


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_a_whole_batch_of_images_are_exact(isa, dtype) -> None:
    """As many as fill 65 blocks of 264 and leave one over."""
    m = 65 * 264 + 1
    case = Case(QuantSpec(4, 8), 276, 24, torch.float16, power_of_two=True)
    x = torch.randint(-2, 3, (m, 24)).to(dtype)
    assert torch.equal(case.gemm(x, isa=isa), (x.double() @ case.dense.t()).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 7, 8])
@pytest.mark.parametrize("m", [1, 2, 8, 13, 40, 600])
def test_number_of_threads_changes_no_bit(isa, m, bits, dtype) -> None:
    case = Case(QuantSpec(bits, 24), 276, 424, torch.float16)
    x = torch.randn(m, 424).to(dtype)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs.append(case.gemm(x, isa=isa))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [1, 3, 30])
def test_nothing_is_written_beside_the_output(isa, m) -> None:
    n, k, margin = 21, 56, 64
    case = Case(QuantSpec(5, 16), n, k, torch.float32)
    x, y = torch.randn(m, k), torch.full((2 * margin + m * n,), 7.0)
    weight, scale, zero = case.runtime
    _native.module().gemm(
        x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        0,
        y[margin:].data_ptr(),
        bits=5,
        group_size=16,
        m=m,
        n=n,
        k=k,
        dtype=0,
        scale_dtype=0,
        activation=0,
        isa=isa,
    )
    assert (y[:margin] == 7).all() and (y[-margin:] == 7).all()
    assert torch.equal(y[margin:-margin].view(m, n), case.gemm(x, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_all_24_bits_of_a_single_token_count(isa, bits) -> None:
    """x in fp32 goes as three terms of bf16 where there is an instruction for that: none of them may be lost."""
    case = Case(QuantSpec(bits, 32, True), 20, 40, torch.float16, power_of_two=True)
    for column in range(40):
        x = torch.zeros(1, 40)
        x[0, column] = (torch.randint(2**23, 2**24, ()).float() * 2.0 ** torch.randint(-80, 40, ())).item()
        y, expected = case.gemm(x, isa=isa).double(), x.double() @ case.dense.t()
        assert ((y - expected).abs() <= expected.abs() * 2**-22).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_infinite_and_missing_values_stay_in_their_row(bits) -> None:
    case = Case(QuantSpec(bits, 32, True), 20, 64, torch.float16)
    assert case.gemm(torch.full((1, 64), float("nan"))).isnan().all()
    for m in (2, 12):
        x = torch.randn(m, 64)
        x[1, 5] = float("nan")
        y = case.gemm(x)
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2:].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 4])
def test_an_infinity_gives_infinities_of_the_right_sign(isa, dtype, bits) -> None:
    """x in fp16 goes as two terms of bf16: the second of an infinity must not be infinity - infinity."""
    case = Case(QuantSpec(bits, 32, True), 20, 64, torch.float16)
    for m in (1, 12):
        x = torch.randn(m, 64).to(dtype)
        x[0, 5] = float("inf")
        y, column = case.gemm(x, isa=isa)[0], case.dense[:, 5]
        assert torch.equal(y[column != 0], column[column != 0].sign().to(dtype) * float("inf"))


@pytest.mark.parametrize("isa", ISAS)
def test_the_smallest_and_largest_of_fp16_are_exact(isa) -> None:
    case = Case(QuantSpec(8, 32, True), 20, 32, torch.float16, power_of_two=True)
    x = torch.zeros(2, 32, dtype=torch.float16)
    x[0, 3], x[1, 3] = 65504, 2**-24
    y = case.gemm(x, isa=isa)
    assert torch.equal(y, (x.double() @ case.dense.t()).to(torch.float16))


def test_guards_name_argument_requirement_and_value(monkeypatch) -> None:
    native = _native.module()
    with pytest.raises(ValueError, match="bits must be from 2 to 8, got 9"):
        native.pack(0, 0, bits=9, n=1, k=1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        native.unpack(0, 0, bits=4, n=1, k=1, threads=0)
    with pytest.raises(ValueError, match="group_size must be -1 or a positive multiple of 8, got 12"):
        native.dequantize(0, 0, 0, 0, bits=4, group_size=12, n=1, k=1, dtype=0, scale_dtype=0)
    with pytest.raises(ValueError, match=r"scale_dtype must be 0 .*, got 3"):
        native.dequantize(0, 0, 0, 0, bits=4, group_size=8, n=1, k=1, dtype=0, scale_dtype=3)
    with pytest.raises(ValueError, match=r"isa must be one of scalar.*, got 'sse9'"):
        native.isa("sse9")
    monkeypatch.setenv("MMQ_CPU_ISA", "neon9")
    with pytest.raises(ValueError, match=r"MMQ_CPU_ISA must be one of scalar.*, got 'neon9'"):
        _native.isa()
    monkeypatch.setenv("MMQ_CPU_ISA", "scalar")
    assert _native.isa() == "scalar"
