"""The Triton kernels themselves: every configuration, every way that scales enter, and products of split k."""

from __future__ import annotations

import pytest
import torch
from cases import Case, linear_bound

from mmq_kernels.backends import backend
from mmq_kernels.backends.triton.backend import interpreted
from mmq_kernels.backends.triton.configs import KNOWN, TOKEN_TILES, Config, candidates, default_config
from mmq_kernels.spec import BITS, QuantSpec

TRITON = backend("triton")
MISSING = TRITON.why_unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"triton: {MISSING}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = dict.fromkeys(
    config
    for tile in TOKEN_TILES
    for arch in (*KNOWN, "xpu")
    for config in (default_config(arch, tile), *candidates(arch, tile))
)
if interpreted():  # which knows neither warps nor stages
    CONFIGS = {(c.block_m, c.block_n, c.block_k, c.waves): c for c in CONFIGS}.values()


def run(case: Case, x, config: Config, activation="none", bias=None, perm=None, input_scale=None) -> torch.Tensor:
    """A product with a given configuration, on outputs that are poisoned."""
    moved = [None if t is None else t.to(DEVICE) for t in (x, perm, input_scale, bias)]
    y = torch.empty(x.shape[0], case.n, dtype=x.dtype, device=DEVICE)
    TRITON._launch_gemm(moved[0], case.runtime, *moved[1:], y, case.spec, activation, config)
    return y.cpu()


def split(config: Config, case: Case, m: int) -> int:
    from mmq_kernels.backends.triton.backend import _machine

    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    return config.splits(m, case.n, case.k, _machine(device).multiprocessors)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_is_exact_on_small_integers(config) -> None:
    """One tile of rows and a bit, steps that do not fill the last one; half of them with a scale for each step."""
    for spec in (QuantSpec(4, 64), QuantSpec(3, 24, True)):
        case = Case(spec, config.block_n + 3, 3 * config.block_k + 8, torch.float16, True, TRITON, DEVICE)
        x = torch.randint(-2, 3, (5, case.k)).half()
        try:
            got = run(case, x, config)
        except Exception as error:  # a GPU with less shared memory than the largest tiles take
            if type(error).__name__ != "OutOfResources":
                raise
            pytest.skip(f"{torch.cuda.get_device_name()}: {error}")
        assert torch.equal(got, (x.double() @ case.dense.t()).half()), spec


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_way_that_scales_enter(bits, dtype) -> None:
    """Per row; groups as long as a step and longer; shorter than a step; of 8, which end inside of a word."""
    seen = set()
    for group, config in (
        (-1, Config(16, 16, 32, 4, 2, 1)),
        (64, Config(16, 16, 32, 4, 2, 1)),
        (64, Config(128, 16, 32, 4, 2, 1)),
        (32, Config(128, 16, 64, 4, 2, 1)),
        (24, Config(16, 16, 64, 4, 2, 1)),
        (8, Config(16, 16, 32, 4, 2, 1)),
    ):
        for scale_dtype in (torch.float16, torch.float32):
            spec = QuantSpec(bits, group, bits % 2 == 0)
            case = Case(spec, 19, 136, scale_dtype, owner=TRITON, device=DEVICE)
            seen.add(config.fitted(spec, 136, scale_dtype == torch.float32)[1])
            x, bias = torch.randn(3, 136).to(dtype), torch.randn(19).to(dtype)
            expected, bound = linear_bound(case, x, bias, "gelu", rounded_weights=True)
            got = run(case, x, config, "gelu", bias)
            assert ((got.double() - expected).abs() <= bound).all(), (group, config, scale_dtype)
    assert seen == {"row", "after", "tile", "word", "pair"} - ({"pair"} if bits > 3 else set())


def test_split_products_are_exact_and_leave_their_counters_at_zero(monkeypatch) -> None:
    case = Case(QuantSpec(5, 64), 40, 1160, torch.float16, True, TRITON, DEVICE)
    taken, take = [], TRITON._take_counters

    def taking(count, device):
        taken.append(take(count, device))
        return taken[-1]

    monkeypatch.setattr(TRITON, "_take_counters", taking)
    config = Config(16, 32, 32, 4, 2, 4)
    for m in (1, 20):
        assert split(config, case, m) > 1
        x, bias = torch.randint(-2, 3, (m, 1160)).half(), torch.randint(-4, 5, (40,)).half()
        expected = (x.double() @ case.dense.t() + bias.double()).clamp(min=0)
        assert torch.equal(run(case, x, config, "relu", bias), expected.half())
    assert len(taken) == 2 and not any(counters.any() for counters in taken)


def test_split_products_round_like_whole_ones_up_to_the_order_of_sums() -> None:
    case = Case(QuantSpec(3, 32), 24, 1024, torch.float16, owner=TRITON, device=DEVICE)
    x = torch.randn(7, 1024).half()
    expected, bound = linear_bound(case, x, None, "none")
    for waves in (1, 2, 4):
        config = Config(16, 16, 32, 4, 2, waves)
        got = run(case, x, config)
        assert ((got.double() - expected).abs() <= bound).all()
        assert torch.equal(got, run(case, x, config))


def test_column_order_and_input_scale_inside_the_kernel() -> None:
    case = Case(QuantSpec(6, 48), 40, 104, torch.float16, owner=TRITON, device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16):
        perm, scale = torch.randperm(104).int(), (torch.rand(104) + 0.5).to(dtype)
        x = torch.randn(9, 104).to(dtype)
        expected, bound = linear_bound(case, (x / scale)[:, perm.long()], None, "silu", rounded_weights=True)
        got = run(case, x, Config(16, 32, 64, 4, 2, 1), "silu", perm=perm, input_scale=scale)
        assert ((got.double() - expected).abs() <= bound).all()


def test_nothing_is_written_beside_the_output() -> None:
    case = Case(QuantSpec(4, 32), 21, 56, torch.float16, owner=TRITON, device=DEVICE)
    margin, x = 64, torch.randn(3, 56).half().to(DEVICE)
    flat = torch.full((2 * margin + 63,), 7.0, dtype=torch.float16, device=DEVICE)
    y = flat[margin:-margin].view(3, 21)
    TRITON._launch_gemm(x, case.runtime, None, None, None, y, case.spec, "none", Config(16, 16, 32, 4, 2, 1))
    assert (flat[:margin] == 7).all() and (flat[-margin:] == 7).all()
    assert torch.equal(y.cpu(), run(case, x.cpu(), Config(16, 16, 32, 4, 2, 1)))


def test_dense_kernel_agrees() -> None:
    case = Case(QuantSpec(3, 32), 20, 72, torch.float16, owner=TRITON, device=DEVICE)
    for dtype, tolerance in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-5)):
        x, bias, perm = torch.randn(6, 72).to(dtype), torch.randn(20).to(dtype), torch.randperm(72).int()
        moved = [part.to(DEVICE) for part in (x, bias, perm)]
        y = TRITON.gemm(moved[0], case.runtime, moved[1], case.spec, 20, "planes", "gelu", moved[2], kernel="dense")
        expected, _ = linear_bound(case, x[:, perm.long()], bias, "gelu")
        torch.testing.assert_close(y.cpu().double(), expected, rtol=tolerance, atol=tolerance)
