"""Products, factors and updates by either library, against fp64 and against the plain loop."""

import pytest
import torch

from mmq_kernels.quantize import products
from mmq_kernels.quantize.carry import Carry
from mmq_kernels.quantize.products import add_product_
from mmq_kernels.quantize.triangles import cholesky

LIBRARIES = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not products.AVAILABLE, reason="torch has no oneDNN here")),
]


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SHAPES = [(1, 1, 1), (3, 5, 1500), (130, 64, 33), (65, 257, 1025), (4, 0, 3), (0, 4, 3)]


@pytest.fixture(params=LIBRARIES, ids=["blas", "onednn"])
def library(request, monkeypatch) -> None:
    """Each library, whatever the size."""
    monkeypatch.setattr(products, "ONEDNN", request.param)
    monkeypatch.setattr(products, "_WORTH", 1)


@pytest.mark.parametrize("alpha", [1, -1])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (3, 5, 1500), (130, 64, 33), (65, 257, 1025), (4, 0, 3), (0, 4, 3)]
)
def test_a_product_is_added_to_a_part_of_a_matrix(library, m, k, n, alpha) -> None:
    total, a, b = torch.randn(m + 2, n + 3), torch.randn(k, m).t(), torch.randn(k + 1, n + 1)[1:, 1:]
    before, part = total.clone(), total[1:-1, 2:-1]
    expected = part.double() + alpha * (a.double() @ b.double())
    add_product_(part, a, b, alpha=alpha)
    torch.testing.assert_close(part.double(), expected, **CLOSE)
    part.copy_(before[1:-1, 2:-1])
    assert torch.equal(total, before), "beside the part nothing changes"


def test_products_of_a_batch(library) -> None:
    total, a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 4), torch.randn(3, 4, 7)
    expected = total - a @ b
    add_product_(total, a, b, alpha=-1)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("k", [1, 2, 255, 256, 257, 513, 900])
def test_a_cholesky_factor(library, k) -> None:
    x = torch.randn(2 * k + 3, k, dtype=torch.float64)
    matrix = (x.t() @ x / len(x)).float()
    expected = torch.linalg.cholesky(matrix.double())
    lower = cholesky(matrix.clone())
    assert torch.equal(lower, lower.tril())
    assert ((lower - expected).abs() <= 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("at", [0, 255, 256, 699])
def test_what_is_not_positive_definite_has_no_factor(library, at) -> None:
    matrix = torch.eye(700)
    matrix[at, at] = -1
    assert cholesky(matrix) is None


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize("ahead", [0, 1, 700, 2000])
def test_what_is_carried_is_there_when_it_is_looked_at(library, layers, ahead) -> None:
    """Blocks of all widths; now and then a grid looks further ahead than its block."""
    n, k = 6, 1700
    given, upper = torch.randn(*layers, n, k), torch.randn(*layers, k, k).triu() / k**0.5
    expected, carry = given.double(), Carry(given.clone(), upper)
    ends = [1, 128, 129, 400, 512, 520, 1032, 1040, 1699, k]
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if ahead and i % 2:
            seen = min(k, end + ahead)
            torch.testing.assert_close(carry.columns(start, seen).double(), expected[..., start:seen], **CLOSE)
        torch.testing.assert_close(carry.columns(start, end).double(), expected[..., start:end], **CLOSE)
        error = torch.randn(*layers, n, end - start)
        expected[..., end:] -= error.double() @ upper[..., start:end, end:].double()
        carry.add(error, end)
