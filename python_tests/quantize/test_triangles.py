"""Triangular inverses and symmetric products, against fp64, at sizes around their leaves and panels."""

import pytest
import torch

from mmq_kernels.quantize.hessian import Hessian, factorize
from mmq_kernels.quantize.settings import GptqSettings
from mmq_kernels.quantize.triangles import add_lower_gram_, invert_lower_, mirror_lower_

SIZES = [1, 2, 255, 256, 257, 513, 700]


def correlated(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, dtype=torch.float64) @ (torch.eye(k) + 0.1 * torch.randn(k, k) / k**0.5).double()


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_lower_triangle_is_inverted_in_its_place(k, by_columns) -> None:
    x = correlated(2 * k + 3, k)
    lower = torch.linalg.cholesky(x.t() @ x / len(x)).float()
    given = lower.t().clone(memory_format=torch.contiguous_format).t() if by_columns else lower.clone()
    assert invert_lower_(given).data_ptr() == given.data_ptr()
    expected = torch.linalg.inv(lower.double())
    assert torch.equal(given, given.tril())
    assert ((given - expected).abs() <= 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("k", SIZES)
def test_a_gram_matrix_from_panels_is_symmetric_and_whole(k) -> None:
    parts = [torch.randn(m, k) for m in (3, 0, 40)]
    total = torch.zeros(k, k)
    for part in parts:
        add_lower_gram_(total, part)
    mirror_lower_(total)
    expected = sum(part.double().t() @ part.double() for part in parts)
    assert torch.equal(total, total.t())
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_factor_is_that_of_the_inverse() -> None:
    x, k = correlated(900, 300).float(), 300
    hessian = Hessian(k, x.device)
    hessian.add(x)
    for order in ("input", "activation"):
        factor = factorize(hessian.value(), GptqSettings(order=order), "layer")
        expected = torch.linalg.cholesky(torch.linalg.inv(factor.damped().double()), upper=True)
        assert torch.equal(factor.upper, factor.upper.triu())
        assert ((factor.upper - expected).abs() <= 1e-5 * expected.abs().max()).all()
