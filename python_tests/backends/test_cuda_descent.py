"""search_grid and descend of the CUDA backend: the compiled CPU kernels' results, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import CPU, ISAS, NO_EXTENSION
from test_cpu_quantizers import DTYPES, assert_equal, hard_weight

from mmq_kernels.backends.descent import Descended
from mmq_kernels.spec import BITS, QuantSpec

pytestmark = pytest.mark.skipif(not ISAS, reason=NO_EXTENSION)

SPECS = [QuantSpec(bits, -1, symmetric) for bits in BITS for symmetric in (False, True)]


def moved_group(n: int, columns: int, spec: QuantSpec, dtype: torch.dtype) -> list[torch.Tensor]:
    """Arguments of `descend`: gradient and Hessian as slices, rounded codes some of which were then spoiled."""
    x = torch.randn(2 * columns + 20, columns + 8)
    x = x @ torch.randn(columns + 8, columns + 8) * 0.3 + x
    hessian = x.t() @ x / len(x) + 0.1 * torch.eye(columns + 8)
    weight = torch.randn(n, columns) * 10.0 ** torch.randint(-3, 2, (n, 1))
    codes, scale, zero = CPU.quantize_rtn(weight, spec, dtype)
    spoiled = torch.rand(n, columns) < 0.2
    codes = torch.where(spoiled, torch.randint(0, 2**spec.bits, (n, columns), dtype=torch.uint8), codes)
    gradient = torch.empty(n, columns + 5)
    dense = scale.float() * (codes.float() - zero.float())
    gradient[:, :columns] = (dense - weight) @ hessian[:columns, :columns]
    return [gradient[:, :columns], hessian[:columns, :columns], codes, scale[:, 0].float(), zero[:, 0]]


def descended(machine, group: list[torch.Tensor], spec: QuantSpec, dtype: torch.dtype) -> Descended:
    """On the machine; nothing that was handed over may change."""
    there = machine.to(*group)
    before = [part.clone() for part in there]
    found = machine.backend.descend(*there, spec, dtype)
    assert_equal(there, before)
    return Descended(*(part.cpu() for part in found))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_descent_is_the_cpus(spec, machine) -> None:
    dtype = DTYPES[(spec.bits + spec.symmetric) % 3]
    shapes = ((1, 1), (33, 30), (40, 128)) if spec.bits == 3 else ((37, 32), (7, 9))
    for n, columns in shapes:
        group = moved_group(n, columns, spec, dtype)
        expected = CPU.descend(*group, spec, dtype)
        assert_equal(descended(machine, group, spec, dtype), expected)
        if columns > 1:
            assert not torch.equal(expected.codes, group[2]) and not torch.equal(expected.scale, group[3])
            assert (expected.gained < 0).any()


def test_zero_points_move_too(machine) -> None:
    """From a grid that is one or two steps off."""
    spec = QuantSpec(4, -1)
    gradient, hessian, codes, scale, zero = moved_group(35, 48, spec, torch.float16)
    group = [gradient, hessian, codes, scale, (zero.int() + torch.randint(-2, 3, zero.shape)).clamp(0, 15).byte()]
    expected = CPU.descend(*group, spec, torch.float16)
    assert (expected.zero != group[4]).float().mean() > 0.2
    assert_equal(descended(machine, group, spec, torch.float16), expected)


def test_wider_groups_descend_by_blocks(machine) -> None:
    """More columns than one launch takes: the steps are the same, sums differ in their order."""
    spec = QuantSpec(3, -1)
    group = moved_group(20, 200, spec, torch.float16)
    got, expected = descended(machine, group, spec, torch.float16), CPU.descend(*group, spec, torch.float16)
    assert (got.codes == expected.codes).float().mean() > 0.98
    torch.testing.assert_close(got.gained, expected.gained, rtol=0.02, atol=1e-4)


def test_no_rows_and_no_columns(machine) -> None:
    spec = QuantSpec(4, -1)
    for n, columns in ((0, 16), (3, 0)):
        empty = [torch.zeros(n, columns), torch.zeros(columns, columns), torch.zeros(n, columns, dtype=torch.uint8)]
        found = machine.backend.descend(*machine.to(*empty, torch.ones(n), torch.zeros(n).byte()), spec, torch.float16)
        assert found.codes.shape == found.moved.shape == (n, columns)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_search_is_the_cpus(spec, machine) -> None:
    dtype = DTYPES[(spec.bits + spec.symmetric) % 3]
    for n, columns in ((19, 40), (34, 7), (6, 150)) if spec.bits < 5 else ((33, 33),):
        wide = torch.cat([hard_weight(n, columns), torch.ones(n, 3)], 1)
        weight, importance = wide[:, :columns], torch.rand(columns) + 0.1
        expected = CPU.search_grid(weight, importance, spec, dtype)
        found = machine.backend.search_grid(*machine.to(weight, importance), spec, dtype)
        assert_equal([part.cpu() for part in found], expected)


def test_guards_against_other_layouts(machine) -> None:
    native, target = machine.backend._native(), (0, 0)
    with pytest.raises(ValueError, match="columns must be at most 128, got 129"):
        native.descend(0, 129, 0, 129, 0, 0, 0, 0, 0, 4, False, 8, 129, 1, *target)
    with pytest.raises(ValueError, match="gradient_stride must be at least columns, got 7"):
        native.descend(0, 7, 0, 8, 0, 0, 0, 0, 0, 4, False, 8, 8, 1, *target)
    with pytest.raises(ValueError, match="hessian_stride must be at least columns, got 7"):
        native.descend(0, 8, 0, 7, 0, 0, 0, 0, 0, 4, False, 8, 8, 1, *target)
    with pytest.raises(ValueError, match="weight_stride must be at least columns, got 7"):
        native.search_grid(0, 7, 0, 0, 0, 4, False, 8, 8, 1, *target)
