"""Products with activations of 8 bits: the compiled kernels against the reference backend, the reference by hand."""

import pytest
import torch
from cases import ACTIVATIONS, CPU, ISAS, NO_EXTENSION, Case

from mmq_kernels.backends import backend
from mmq_kernels.backends.integer import SEGMENT, quantize_tokens
from mmq_kernels.spec import BITS, QuantSpec

REFERENCE = backend("reference")
needs_extension = pytest.mark.skipif(not ISAS, reason=NO_EXTENSION)

SHAPES = [(1, 1, 1), (3, 33, 100), (4, 16, 32), (5, 50, 264), (9, 20, 40), (13, 48, 520), (30, 17, 72)]
"""Of x and W: tokens around blocks of 1, 4, 8 and 12, tiles that are odd or not whole, ends inside a unit."""


def tokens(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(m, k) * 10.0 ** torch.randint(-3, 3, (m, 1))
    x[0] = 0
    return x.to(dtype)


def by_hand(case: Case, x: torch.Tensor) -> torch.Tensor:
    """The equations in fp64 and, where they say so, fp32."""
    unit = (x.float().abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    integers = torch.round(x.float() / unit).double()
    length, y = case.spec.group_length(case.k), torch.zeros(len(x), case.n)
    for begin in range(0, case.k):
        group = begin // length
        if (begin - group * length) % 256:
            continue
        stop = min(case.k, (group + 1) * length, begin + 256)
        weight = case.codes[:, begin:stop].double() - case.zero[:, group, None].double()
        y = y + case.scale[:, group].float() * (integers[:, begin:stop] @ weight.t()).float()
    return y * unit


def integer(owner, case: Case, x: torch.Tensor, bias=None, activation: str = "none", **isa) -> torch.Tensor:
    return owner.gemm_integer(x, case.runtime, bias, case.spec, case.n, "cpu", activation, **isa)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_the_equations_bit_for_bit(bits, symmetric, isa) -> None:
    for i, (m, n, k) in enumerate(SHAPES):
        dtype = (torch.float32, torch.float16, torch.bfloat16)[i % 3]
        for group in (-1, 8, 40, 64):
            case = Case(QuantSpec(bits, group, symmetric), n, k, dtype)
            x = tokens(m, k, dtype)
            expected = by_hand(case, x).to(dtype)
            assert torch.equal(integer(CPU, case, x, isa=isa), expected), (m, n, k, group)
            assert torch.equal(integer(REFERENCE, case, x), expected), (m, n, k, group)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_there_are_do_not_overflow(sign, bits, isa) -> None:
    case = Case(QuantSpec(bits, 256), 20, 512, torch.float32, code=2**bits - 1)
    for m in (1, 4, 13):
        x = torch.full((m, 512), 3.0 * sign)
        assert torch.equal(integer(CPU, case, x, isa=isa), by_hand(case, x).float())


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_bias_and_activation_follow(activation, isa) -> None:
    case, x, bias = Case(QuantSpec(5, 32), 40, 96, torch.float16), torch.randn(6, 96), torch.randn(40)
    expected = integer(REFERENCE, case, x, bias, activation)
    torch.testing.assert_close(integer(CPU, case, x, bias, activation, isa=isa), expected, rtol=1e-5, atol=1e-6)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
def test_the_error_stays_within_what_the_op_documents(isa) -> None:
    case, x = Case(QuantSpec(4, 64), 32, 300, torch.float32), torch.randn(20, 300)
    bound = x.abs().amax(1, keepdim=True).double() / 254 @ case.dense.abs().sum(1)[None]
    error = (integer(CPU, case, x, isa=isa).double() - x.double() @ case.dense.t()).abs()
    assert (error <= bound * (1 + 1e-5) + 1e-5).all()
    assert error.max() > 0


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_that_is_not_finite_spoils_itself_alone(isa) -> None:
    case, x = Case(QuantSpec(4, 32), 20, 64, torch.float16), torch.randn(5, 64)
    clean = integer(CPU, case, x, isa=isa)
    x[1, 7], x[3, 63] = torch.nan, -torch.inf
    for owner in (CPU, REFERENCE):
        y = integer(owner, case, x, **({"isa": isa} if owner is CPU else {}))
        assert y[[1, 3]].isnan().all()
        assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


@needs_extension
def test_number_of_threads_and_tokens_beside_change_no_bit() -> None:
    case, x = Case(QuantSpec(3, 128), 300, 256, torch.float16), torch.randn(40, 256)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(integer(CPU, case, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(integer(CPU, case, x[17:18]), found[0][17:18])
    assert integer(CPU, case, x[:0]).shape == (0, 300)


def test_tokens_are_rounded_to_127_units() -> None:
    integers, unit = quantize_tokens(torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]]))
    assert integers.tolist() == [[127.0, -64.0, 0.0, 2.0], [0.0] * 4]
    assert unit[0].item() == 1.0
    assert 255 * 127 * SEGMENT < 2**24
