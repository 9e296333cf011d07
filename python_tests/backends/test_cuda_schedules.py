"""The emulated kernels under unkind schedules and on machines of several sizes: no complaint, and the same bits."""

from __future__ import annotations

import random

import pytest
import torch
from cases import Case
from test_cpu_quantizers import inverse_factor

from mmq_kernels.spec import QuantSpec

POLICIES = ("in order", "reverse", "run-ahead")


TOKENS = ((1, 8), (9, 16), (17, 32), (33, 90))
"""Of each token tile."""


def products(emulated, seed: int, tokens=TOKENS) -> list[torch.Tensor]:
    """A small product of each token tile, with everything that a product can have."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    results = []
    for m in [draw.randint(*some) for some in tokens]:
        spec = QuantSpec(draw.randint(2, 8), draw.choice((-1, 16, 32, 48, 128)), draw.random() < 0.5)
        n, k = draw.choice((1, 64, 70, 260)), draw.choice((64, 130, 200, 320))
        case = Case(spec, n, k, torch.float16, owner=emulated)
        x, bias = torch.randn(m, k).half(), torch.randn(n).half()
        perm = torch.randperm(k).int() if draw.random() < 0.3 else None
        results.append(emulated.gemm(x, case.runtime, bias, spec, n, "cuda", "relu", perm))
    return results


def conversions(emulated, seed: int) -> list[torch.Tensor]:
    """Everything but the product."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    spec = QuantSpec(draw.randint(2, 8), draw.choice((-1, 16, 64)), draw.random() < 0.5)
    n, k = draw.randint(1, 70), draw.randint(1, 140)
    case = Case(spec, n, k, torch.float32, owner=emulated)
    weight, factor = torch.randn(35, 24), inverse_factor(24)
    return [
        emulated.dequantize(case.runtime, spec, n, k, "cuda", torch.float16),
        emulated.unprepack(case.runtime, spec, n, k).words,
        emulated.unpack(emulated.pack(case.codes, spec.bits), spec.bits, k),
        *emulated.quantize_rtn(weight, spec, torch.float16),
        *emulated.gptq_block(weight, factor, None, None, QuantSpec(spec.bits, 8), torch.float16),
        *emulated.search_grid(weight, factor.diagonal().contiguous(), spec, torch.float16),
        *emulated.descend(
            weight,
            factor.t() @ factor,
            torch.randint(0, 4, weight.shape, dtype=torch.uint8),
            weight[:, 0].abs() + 0.1,
            torch.full((35,), 2, dtype=torch.uint8),
            QuantSpec(spec.bits, -1),
            torch.float32,
        ),
    ]


@pytest.mark.parametrize("work", [products, conversions])
def test_no_schedule_changes_a_bit(work, emulated) -> None:
    with emulated.scheduled("in order"):
        expected = work(emulated, 7)
    for policy in POLICIES:
        for seed in range(3):
            with emulated.scheduled(policy, seed, resident_blocks=1 + seed):
                for got, want in zip(work(emulated, 7), expected, strict=True):
                    assert torch.equal(got, want)


def test_a_hundred_runs_raise_nothing(emulated) -> None:
    for run in range(100):
        with emulated.scheduled(POLICIES[run % 3], run, resident_blocks=1 + run % 4, multiprocessors=1 + run % 5):
            made = products(emulated, run, [TOKENS[run // 2 % 4]]) if run % 2 else conversions(emulated, run)
        assert not any(part.isnan().any() for part in made)  # what outputs hold before anything is written


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 7])
def test_blocks_that_share_a_tile_add_up(policy, multiprocessors, emulated) -> None:
    """Tiles cut between blocks, whole tiles, and both in one launch; counters are left at zero."""
    for m, n, k, bits in ((3, 64, 1024, 2), (5, 600, 640, 4), (40, 700, 320, 3)):
        spec = QuantSpec(bits, 64)
        case = Case(spec, n, k, torch.float16, power_of_two=True, owner=emulated)
        x = torch.randint(-2, 3, (m, k)).half()
        expected = (x.double() @ case.dense.t()).half()
        with emulated.scheduled(policy, multiprocessors=multiprocessors, resident_blocks=4):
            plan = emulated._native().gemm_plan(bits, 64, m, n, k, 1, 0)
            counters = torch.zeros(max(1, plan["counters"]), dtype=torch.int32)
            emulated._take_counters = lambda count, device, held=counters: held[:count]
            try:
                assert torch.equal(emulated.gemm(x, case.runtime, None, spec, n, "cuda", "none"), expected)
            finally:
                del emulated._take_counters
        assert not counters.any()


def test_the_plans_of_the_previous_test_cut_tiles(emulated) -> None:
    kinds = set()
    for multiprocessors in (1, 2, 3, 7):
        for m, n, k, bits in ((3, 64, 1024, 2), (5, 600, 640, 4), (40, 700, 320, 3)):
            with emulated.scheduled("in order", multiprocessors=multiprocessors):
                plan = emulated._native().gemm_plan(bits, 64, m, n, k, 1, 0)
            kinds.add((plan["whole_tiles"] > 0, plan["counters"] > 0))
    assert kinds >= {(False, True), (True, True), (True, False)}


@pytest.mark.parametrize("limit", [64, 99, 163, 227])
def test_gpus_with_less_and_more_shared_memory(limit, emulated) -> None:
    """The number of stages follows the GPU; the result does not."""
    spec = QuantSpec(8, 16)
    case = Case(spec, 70, 640, torch.float32, power_of_two=True, owner=emulated)
    for m in (1, 30, 50):
        x = torch.randint(-2, 3, (m, 640)).half()
        with emulated.scheduled("reverse", shared_limit=limit * 1024):
            got = emulated.gemm(x, case.runtime, None, spec, 70, "cuda", "none")
        assert torch.equal(got, (x.double() @ case.dense.t()).half())


def test_too_little_shared_memory_is_said(emulated) -> None:
    with (
        emulated.scheduled("in order", shared_limit=16 * 1024),
        pytest.raises(ValueError, match="shared memory of a block"),
    ):
        emulated._native().gemm_plan(8, 16, 1, 64, 64, 0, 0)
