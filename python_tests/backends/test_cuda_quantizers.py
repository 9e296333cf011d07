"""quantize_rtn and gptq_block of the CUDA backend: equal to the reference backend bit for bit."""

from __future__ import annotations

import pytest
import torch
from test_cpu_quantizers import DTYPES, SPECS, assert_equal, hard_weight, inverse_factor

from mmq_kernels.backends import backend
from mmq_kernels.spec import QuantSpec

REFERENCE = backend("reference")


def run(machine, op: str, tensors, *settings) -> list[torch.Tensor]:
    return [part.cpu() for part in getattr(machine.backend, op)(*machine.to(*tensors), *settings)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rtn_equals_the_reference(spec, machine) -> None:
    for i, dtype in enumerate(DTYPES):
        scale_dtype = DTYPES[(i + spec.bits) % 3]
        for k in (100, 296 if dtype == torch.float16 else 7):
            weight = hard_weight(19, k).to(dtype)
            expected = REFERENCE.quantize_rtn(weight, spec, scale_dtype)
            assert_equal(run(machine, "quantize_rtn", [weight], spec, scale_dtype), expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_block_equals_the_reference(spec, machine) -> None:
    scale_dtype = DTYPES[spec.bits % 3]
    for n, columns in ((19, 40), (33, 128) if spec.bits == 4 else (7, 72), (6, 3)):
        hinv, weight = inverse_factor(columns), hard_weight(n, columns)
        expected = REFERENCE.gptq_block(weight, hinv, None, None, spec, scale_dtype)
        assert_equal(run(machine, "gptq_block", [weight, hinv, None, None], spec, scale_dtype), expected)
        given = REFERENCE.quantize_rtn(weight, spec, scale_dtype)[1:]
        expected = REFERENCE.gptq_block(weight, hinv, *given, spec, scale_dtype)
        assert_equal(run(machine, "gptq_block", [weight, hinv, *given], spec, scale_dtype), expected)


def test_lower_triangle_of_the_factor_does_not_matter(machine) -> None:
    spec, hinv, weight = QuantSpec(4, 16), inverse_factor(48), torch.randn(9, 48)
    expected = run(machine, "gptq_block", [weight, hinv, None, None], spec, torch.float16)
    spoiled = torch.where(torch.ones(48, 48).triu() > 0, hinv, torch.tensor(float("nan")))
    assert_equal(run(machine, "gptq_block", [weight, spoiled, None, None], spec, torch.float16), expected)


def test_views_of_a_wider_weight_and_factor(machine) -> None:
    spec, hinv, weight = QuantSpec(4, 8), inverse_factor(64).to(machine.device), torch.randn(18, 64).to(machine.device)
    columns = slice(24, 48)
    parts = weight[:, columns], hinv[columns, columns]
    expected = run(machine, "gptq_block", [*(part.contiguous() for part in parts), None, None], spec, torch.float16)
    assert_equal(run(machine, "gptq_block", [*parts, None, None], spec, torch.float16), expected)


def test_many_layers_in_one_launch(machine) -> None:
    spec = QuantSpec(3, 16)
    weight, hinv = torch.randn(3, 37, 40), torch.stack([inverse_factor(40) for _ in range(3)])
    got = run(machine, "gptq_blocks", [weight, hinv, None, None], spec, torch.float16)
    expected = REFERENCE.gptq_blocks(weight, hinv, None, None, spec, torch.float16)
    assert_equal(got, expected)
    given = expected[2:]
    got = run(machine, "gptq_blocks", [weight, hinv, *given], spec, torch.float16)
    assert_equal(got, REFERENCE.gptq_blocks(weight, hinv, *given, spec, torch.float16))


@pytest.mark.parametrize("group", [-1, 32, 128, 200, 256])
@pytest.mark.parametrize("given", [False, True])
def test_more_columns_than_a_launch_takes(group, given, machine) -> None:
    """Blocks joined by matrix products: codes almost all equal, and no worse by the error that GPTQ minimizes."""
    spec, hinv, weight = QuantSpec(4, group), inverse_factor(300), torch.randn(40, 300)
    grid = REFERENCE.quantize_rtn(weight, spec, torch.float16)[1:] if given else (None, None)
    expected = REFERENCE.gptq_block(weight, hinv, *grid, spec, torch.float16)
    got = run(machine, "gptq_block", [weight, hinv, *grid], spec, torch.float16)
    assert [part.shape for part in got] == [part.shape for part in expected]
    assert (got[0] == expected[0]).float().mean() >= 0.999
    hessian = torch.linalg.inv(hinv.t() @ hinv)
    length = spec.group_length(300)
    errors = []
    for codes, _, scale, zero in (got, expected):
        wide = [part.float().repeat_interleave(length, 1)[:, :300] for part in (scale, zero)]
        lost = weight - wide[0] * (codes.float() - wide[1])
        errors.append(float(((lost @ hessian) * lost).sum()))
    assert errors[0] <= 1.001 * errors[1]
