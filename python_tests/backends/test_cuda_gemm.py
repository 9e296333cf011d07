"""The packed product of the CUDA backend against fp64: every kernel, in emulation and on a GPU where there is one."""

from __future__ import annotations

import random

import pytest
import torch
from cases import ACTIVATIONS, Case, linear_bound, sample
from torch import Tensor

from mmq_kernels.backends import transformed
from mmq_kernels.spec import BITS, QuantSpec

DTYPES = (torch.float16, torch.bfloat16)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = (-1, 16, 32, 48, 64, 80, 128)
M, N, K = (0, 1, 2, 7, 8, 9, 17, 33, 89), (1, 5, 16, 33, 64, 70, 257), (1, 8, 40, 64, 72, 100, 200, 392)
AXES = (M, N, K, GROUPS, (False, True), DTYPES, SCALE_DTYPES, tuple(ACTIVATIONS), (False, True))
TOKEN_TILES = {1: 3, 2: 12, 4: 20, 11: 40}
"""A number of tokens for each token tile that a plan can have."""


def multiply(
    machine, case: Case, x: Tensor, bias: Tensor | None = None, activation: str = "none", perm=None, input_scale=None
) -> Tensor:
    x, bias, perm, input_scale = machine.to(x, bias, perm, input_scale)
    spec, n = case.spec, case.n
    y = machine.backend.gemm(x, case.runtime, bias, spec, n, "cuda", activation, perm, input_scale, kernel="packed")
    return y.cpu()


def make(machine, spec: QuantSpec, n: int, k: int, scale_dtype: torch.dtype, power_of_two: bool = False) -> Case:
    return Case(spec, n, k, scale_dtype, power_of_two, machine.backend, machine.device)


@pytest.mark.parametrize("bits", BITS)
def test_small_integers_are_exact(bits, machine) -> None:
    for m, n, k, group, symmetric, dtype, scale_dtype, _, with_bias in sample(AXES, bits, 24):
        case = make(machine, QuantSpec(bits, group, symmetric), n, k, scale_dtype, power_of_two=True)
        x = torch.randint(-2, 3, (m, k)).to(dtype)
        bias = torch.randint(-4, 5, (n,)).to(dtype) if with_bias else None
        expected = x.double() @ case.dense.t() + (bias.double() if with_bias else 0)
        got = multiply(machine, case, x, bias)
        assert got.dtype == dtype and got.shape == (m, n)
        assert torch.equal(got, expected.to(dtype)), (m, n, k, case.spec, dtype)


@pytest.mark.parametrize("bits", BITS)
def test_random_inputs_are_as_near_as_dequantize_and_matmul(bits, machine) -> None:
    for m, n, k, group, symmetric, dtype, scale_dtype, activation, with_bias in sample(AXES, 10 + bits, 32):
        case = make(machine, QuantSpec(bits, group, symmetric), n, k, scale_dtype)
        x = torch.randn(m, k).to(dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        expected, bound = linear_bound(case, x, bias, activation)
        got = multiply(machine, case, x, bias, activation)
        assert ((got.double() - expected).abs() <= bound).all(), (m, n, k, case.spec, dtype, activation)


@pytest.mark.parametrize("bits", BITS)
def test_every_combination_of_group_symmetry_dtype_and_activation(bits, machine) -> None:
    for group in GROUPS:
        for symmetric in (False, True):
            case = make(machine, QuantSpec(bits, group, symmetric), 20, 136, SCALE_DTYPES[group % 3])
            for dtype in DTYPES:
                x, bias = torch.randn(3, 136).to(dtype), torch.randn(20).to(dtype)
                for activation in ACTIVATIONS:
                    expected, bound = linear_bound(case, x, bias, activation)
                    got = multiply(machine, case, x, bias, activation)
                    assert ((got.double() - expected).abs() <= bound).all(), (case.spec, dtype, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_every_kernel_that_a_plan_can_name(bits, dtype, machine) -> None:
    case = make(machine, QuantSpec(bits, 32), 70, 200, torch.float16)
    for token_tiles, m in TOKEN_TILES.items():
        plan = machine.backend._native().gemm_plan(bits, 32, m, 70, 200, 1, 0)
        assert plan["token_tiles"] == token_tiles
        x = torch.randn(m, 200).to(dtype)
        expected, bound = linear_bound(case, x, None, "none")
        assert ((multiply(machine, case, x).double() - expected).abs() <= bound).all()


def test_plans_name_no_other_kernel(machine) -> None:
    plan = machine.backend._native().gemm_plan
    draw = random.Random(0)
    for _ in range(2000):
        m, n, k = (int(2 ** draw.uniform(0, 14)) for _ in range(3))
        got = plan(draw.choice(BITS), draw.choice((-1, 16, 32, 48, 128)), m, n, k, draw.choice((0, 1)), 0)
        assert got["token_tiles"] in TOKEN_TILES
        assert got["whole_tiles"] == got["tiles"] or got["sharers"] >= got["tiles"] - got["whole_tiles"]
        assert got["counters"] == 0 or got["sharers"] > got["counters"]
        assert got["shared_bytes"] <= 227 * 1024


@pytest.mark.parametrize("k", [3420, 4304])
@pytest.mark.parametrize("m", [1, 9])
def test_long_rows_with_a_ragged_last_group(k, m, machine) -> None:
    for bits, n in ((4, 1), (3, 9), (8, 65)):
        case = make(machine, QuantSpec(bits, 128), n, k, torch.float16)
        x = torch.randn(m, k).half()
        expected, bound = linear_bound(case, x, None, "none")
        assert ((multiply(machine, case, x).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 20, 70])
def test_column_order_and_input_scale(m, dtype, machine) -> None:
    """Up to 64 tokens the kernel gathers x itself; x / s is rounded to x's dtype as torch does it."""
    case = make(machine, QuantSpec(5, 48), 40, 104, torch.float16)
    perm = torch.randperm(104).int()
    input_scale = (torch.rand(104) + 0.5).to(dtype)
    x, bias = torch.randn(m, 104).to(dtype), torch.randn(40).to(dtype)
    for p, s in ((perm, None), (None, input_scale), (perm, input_scale)):
        expected, bound = linear_bound(case, transformed(x, p, s), bias, "silu")
        got = multiply(machine, case, x, bias, "silu", p, s)
        assert ((got.double() - expected).abs() <= bound).all()


def test_rows_that_are_not_aligned(machine) -> None:
    case = make(machine, QuantSpec(4, 32), 24, 64, torch.float16)
    for offset in (1, 4, 8):
        x = torch.randn(5 * 64 + 8).half()[offset : offset + 5 * 64].view(5, 64)
        expected, bound = linear_bound(case, x, None, "none")
        assert ((multiply(machine, case, x).double() - expected).abs() <= bound).all()


def test_infinite_and_missing_values_stay_in_their_row(machine) -> None:
    case = make(machine, QuantSpec(4, 32, True), 20, 64, torch.float16)
    for m in (2, 12, 40):
        x = torch.randn(m, 64).half()
        x[1, 5], x[0, 3] = float("nan"), float("inf")
        y = multiply(machine, case, x)
        assert y[1].isnan().all() and y[2:].isfinite().all() and not y[0].isfinite().any()


def test_large_sums_do_not_overflow_on_the_way(machine) -> None:
    """Products of 255 * 300 summed over 392 columns are far beyond fp16; only the scaled result must fit."""
    case = make(machine, QuantSpec(8, -1), 8, 392, torch.float32)
    x = torch.full((3, 392), 300.0).half()
    expected, bound = linear_bound(case, x, None, "none")
    fits = expected.abs() < 60000
    assert ((multiply(machine, case, x).double() - expected).abs() <= bound)[fits].all() and fits.any()


def test_dense_kernel_agrees(machine) -> None:
    case = make(machine, QuantSpec(3, 32), 20, 72, torch.float16)
    for dtype in (*DTYPES, torch.float32):
        x, bias, perm = torch.randn(6, 72).to(dtype), torch.randn(20).to(dtype), torch.randperm(72).int()
        moved = machine.to(x, bias, perm)
        y = machine.backend.gemm(
            moved[0], case.runtime, moved[1], case.spec, 20, "cuda", "gelu", moved[2], kernel="dense"
        )
        expected, _ = linear_bound(case, transformed(x, perm, None), bias, "gelu")
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
        torch.testing.assert_close(y.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_nothing_is_written_beside_the_output(machine) -> None:
    """On a GPU by margins; the emulation watches every byte anyway."""
    case = make(machine, QuantSpec(5, 16), 21, 56, torch.float32)
    x = torch.randn(3, 56).half().to(machine.device)
    margin = 64
    y = torch.full((2 * margin + 3 * 21,), 7.0, dtype=torch.float16, device=machine.device)
    device, stream = machine.backend._target(x.device)
    plan = machine.backend._native().gemm_plan(5, 16, 3, 21, 56, 0, 0)
    assert plan["counters"] == 0
    weight, scale, zero = (part.data_ptr() for part in case.runtime)
    machine.backend._native().gemm(
        x.data_ptr(),
        weight,
        scale,
        zero,
        0,
        0,
        0,
        y[margin:].data_ptr(),
        0,
        0,
        5,
        16,
        3,
        21,
        56,
        1,
        0,
        0,
        device,
        stream,
    )
    assert (y[:margin] == 7).all() and (y[-margin:] == 7).all()
    assert torch.equal(y[margin:-margin].view(3, 21).cpu(), multiply(machine, case, x.cpu()))


def test_guards_name_argument_requirement_and_value(machine) -> None:
    native = machine.backend._native()
    with pytest.raises(ValueError, match="bits must be from 2 to 8, got 9"):
        native.gemm_plan(9, 32, 1, 1, 64, 1, 0)
    with pytest.raises(ValueError, match="group_size must be -1, at least k, or a positive multiple of 16, got 24"):
        native.gemm_plan(4, 24, 1, 1, 64, 1, 0)
    with pytest.raises(ValueError, match=r"dtype must be 1 \(float16\) or 2 \(bfloat16\), got 0"):
        native.gemm(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 32, 1, 1, 64, 0, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="columns must be at most 128, got 129"):
        native.gptq_block(0, 0, 129, 0, 0, 129, 0, 0, 0, 0, True, 4, 8, True, 1, 1, 129, 1, 0, 0)
    with pytest.raises(ValueError, match="device must be at least 0, got -1"):
        native.pack(0, 0, 4, 1, 1, -1, 0)
