"""quantize_rtn and gptq_block of the compiled backend: equal to the reference backend bit for bit, and right."""

import pytest
import torch
from cases import CPU, ISAS, NO_EXTENSION

from mmq_kernels.backends import backend
from mmq_kernels.spec import BITS, QuantSpec

pytestmark = pytest.mark.skipif(not ISAS, reason=NO_EXTENSION)

REFERENCE = backend("reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [QuantSpec(bits, group, symmetric) for bits in BITS for group in (-1, 8, 32) for symmetric in (False, True)]


def hard_weight(n: int, k: int) -> torch.Tensor:
    """Random rows of several sizes, with groups that are zero, constant, one-sided, tiny and huge."""
    weight = torch.randn(n, k) * 10.0 ** torch.randint(-3, 3, (n, 1))
    weight[0] = 0
    weight[1, : k // 2] = 3.0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    weight[4] = 1e-9
    weight[5, 0] = 6e4
    return weight


def inverse_factor(columns: int) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of a random Hessian."""
    x = torch.randn(4 * columns, columns, dtype=torch.float64)
    hessian = x.t() @ x + 0.01 * columns * torch.eye(columns, dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()


def assert_equal(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rtn_equals_the_reference(spec, isa) -> None:
    for i, dtype in enumerate(DTYPES):
        weight = hard_weight(19, 100).to(dtype)
        scale_dtype = DTYPES[(i + spec.bits) % 3]
        expected = REFERENCE.quantize_rtn(weight, spec, scale_dtype)
        assert_equal(CPU.quantize_rtn(weight, spec, scale_dtype, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_block_equals_the_reference(spec, isa) -> None:
    hinv = inverse_factor(40)
    weight = hard_weight(19, 40)
    scale_dtype = DTYPES[spec.bits % 3]
    expected = REFERENCE.gptq_block(weight, hinv, None, None, spec, scale_dtype)
    assert_equal(CPU.gptq_block(weight, hinv, None, None, spec, scale_dtype, isa), expected)
    given = REFERENCE.quantize_rtn(weight, spec, scale_dtype)[1:]
    expected = REFERENCE.gptq_block(weight, hinv, *given, spec, scale_dtype)
    assert_equal(CPU.gptq_block(weight, hinv, *given, spec, scale_dtype, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 7, 128, 1000])
def test_gptq_block_follows_the_equations(columns, isa) -> None:
    """A loop in fp64 that takes the kernel's codes: each is a nearest code of its column, each error follows."""
    spec = QuantSpec(3, 64)
    hinv, weight = inverse_factor(columns), torch.randn(21, columns)
    kept = weight.clone()
    codes, error, scale, zero = CPU.gptq_block(weight, hinv, None, None, spec, torch.float16, isa)
    assert torch.equal(weight, kept)
    w, h = weight.double(), hinv.double()
    for j in range(columns):
        s, z, q = scale[:, j // 64].double(), zero[:, j // 64].double(), codes[:, j].double()
        ideal = (w[:, j] / s + z).clamp(0, spec.max_code)
        assert ((ideal - q).abs() <= 0.5 + 1e-3).all()
        e = (w[:, j] - s * (q - z)) / h[j, j]
        torch.testing.assert_close(error[:, j].double(), e, rtol=1e-3, atol=1e-3 * e.abs().max().item())
        w[:, j + 1 :] -= e[:, None] * h[j, j + 1 :]


@pytest.mark.parametrize("isa", ISAS)
def test_gptq_block_reads_views(isa) -> None:
    """A block of a wider weight and of a wider factor, as the quantizer passes them; and transposed ones."""
    spec, hinv, weight = QuantSpec(4, 8), inverse_factor(64), torch.randn(18, 64)
    columns = slice(24, 48)
    expected = CPU.gptq_block(
        weight[:, columns].contiguous(), hinv[columns, columns].contiguous(), None, None, spec, torch.float16
    )
    views = (weight[:, columns], hinv[columns, columns])
    assert_equal(CPU.gptq_block(*views, None, None, spec, torch.float16, isa), expected)
    turned = [view.t().contiguous().t() for view in views]
    assert_equal(CPU.gptq_block(*turned, None, None, spec, torch.float16, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_number_of_threads_changes_no_bit_of_a_quantizer(isa) -> None:
    spec, hinv, weight = QuantSpec(4, 32), inverse_factor(96), torch.randn(100, 96)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                CPU.gptq_block(weight, hinv, None, None, spec, torch.float16, isa)
                + CPU.quantize_rtn(weight, spec, torch.float16, isa)
            )
    finally:
        torch.set_num_threads(before)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])
