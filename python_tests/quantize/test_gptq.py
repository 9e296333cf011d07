"""GPTQ against the algorithm of the paper, written plainly in float64."""

import pytest
import torch

from mmq_kernels.backends.blocks import grid_blocks
from mmq_kernels.quantize import GptqSettings, Hessian, QuantizationError, gptq, quantize_weight
from mmq_kernels.quantize.gptq import gptq_side_by_side, weighted_error
from mmq_kernels.quantize.hessian import factorize
from mmq_kernels.quantize.together import gptq_together, pays
from mmq_kernels.spec import QuantSpec

SETTINGS = GptqSettings()


def correlated(rows: int, k: int) -> torch.Tensor:
    """Activations whose channels are far from independent, as real ones are."""
    return torch.randn(rows, max(4, k // 3)) @ torch.randn(max(4, k // 3), k) + 0.1 * torch.randn(rows, k)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1], x.device)
    hessian.add(x[: len(x) // 2])
    hessian.add(x[len(x) // 2 :].view(1, -1, x.shape[1]))
    return hessian.value()


def gptq_plain(
    weight: torch.Tensor, hessian: torch.Tensor, spec: QuantSpec, damping: float, beyond: float = 0
) -> torch.Tensor:
    """Column by column, every error spread over all later columns at once. Returns the dequantized weight.

    `beyond`: the share of a group's weights that its range may leave out at each end.
    """
    weight = weight.double().clone()
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    k = weight.shape[1]
    length = spec.group_length(k)
    out = torch.empty_like(weight)
    for j in range(k):
        if j % length == 0:
            part = weight[:, j : j + length].float()
            part = part.clamp(part.quantile(beyond, 1, True), part.quantile(1 - beyond, 1, True))
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            if spec.symmetric:
                scale = (2 * torch.maximum(-low, high) / spec.max_code).half().double()
                zero = torch.full_like(scale, spec.middle_code)
            else:
                scale = ((high - low) / spec.max_code).half().double()
                zero = torch.round(-low.double() / scale).clamp(0, spec.max_code)
        code = (torch.round(weight[:, j] / scale) + zero).clamp(0, spec.max_code)
        out[:, j] = scale * (code - zero)
        error = (weight[:, j] - out[:, j]) / upper[j, j]
        weight[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return out


@pytest.mark.parametrize("group_size", [-1, 8, 48, 64, 128, 160])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [100, 300])
def test_equals_the_plain_algorithm(group_size, symmetric, k) -> None:
    spec = QuantSpec(3, group_size, symmetric)
    hessian = hessian_of(correlated(400, k))
    weight = torch.randn(24, k)
    got = gptq(weight, factorize(hessian, SETTINGS, "layer"), spec).dequantize(spec)
    expected = gptq_plain(weight, hessian, spec, SETTINGS.damping)
    # A code on the edge may fall the other way in fp32 and lead its row elsewhere; most rows must agree throughout.
    same = (got.double() - expected).abs().amax(1) < 1e-3
    assert same.float().mean() >= 0.7
    ours, theirs = (weighted_error(weight, w, hessian) for w in (got, expected.float()))
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_beats_rounding_where_inputs_correlate(bits, group_size) -> None:
    spec = QuantSpec(bits, group_size)
    hessian = hessian_of(correlated(500, 192))
    weight = torch.randn(32, 192)
    quantized = gptq(weight, factorize(hessian, SETTINGS, "layer"), spec).dequantize(spec)
    nearest = quantize_weight(weight, spec).dequantize(spec)
    assert weighted_error(weight, quantized, hessian) < 0.8 * weighted_error(weight, nearest, hessian)


@pytest.mark.parametrize(("group_size", "k"), [(-1, 300), (8, 300), (96, 300), (128, 300), (256, 300), (512, 300)])
def test_blocks_cover_every_column_once_and_never_split_a_small_group(group_size, k) -> None:
    blocks = list(grid_blocks(k, QuantSpec(4, group_size), 128))
    assert [start for start, _, _ in blocks] == [0] + [end for _, end, _ in blocks[:-1]]
    assert blocks[-1][1] == k
    assert all(end - start <= 128 for start, end, _ in blocks)
    if 0 < group_size <= 128:
        assert all(start % group_size == 0 for start, _, _ in blocks)


def test_a_group_keeps_its_grid() -> None:
    """Every stored code dequantizes with the scale it was optimized for: the grids tile the row."""
    for group_size in (-1, 40, 128, 200):
        spec = QuantSpec(4, group_size)
        out = gptq(torch.randn(8, 300), factorize(hessian_of(correlated(400, 300)), SETTINGS, "layer"), spec)
        assert out.scale.shape == out.zero.shape == (8, spec.groups(300))


def test_inputs_that_were_always_zero_are_rounded_not_zeroed() -> None:
    x = correlated(200, 64)
    x[:, 10:20] = 0
    hessian = hessian_of(x)
    weight = torch.randn(16, 64)
    spec = QuantSpec(4, 16)
    back = gptq(weight, factorize(hessian, SETTINGS, "layer"), spec).dequantize(spec)
    assert (back[:, 10:20] - weight[:, 10:20]).abs().max() < 1.0
    assert back[:, 10:20].abs().max() > 0.5


def test_damping_is_raised_visibly_then_given_up() -> None:
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.04
    with pytest.warns(UserWarning, match="fc1: Hessian not positive definite at damping 0.01, trying 0.1"):
        assert factorize(hessian, SETTINGS, "fc1").damping == pytest.approx(0.1)
    hessian[0, 1] = hessian[1, 0] = 1e9
    with pytest.warns(UserWarning), pytest.raises(QuantizationError, match="fc1: Hessian not positive definite"):
        factorize(hessian, SETTINGS, "fc1")


def test_activations_that_are_not_finite_are_named() -> None:
    hessian = torch.eye(4)
    hessian[2, 2] = torch.nan
    with pytest.raises(QuantizationError, match="fc1: its calibration activations hold NaN or infinity"):
        factorize(hessian, SETTINGS, "fc1")


@pytest.mark.parametrize("block_size", [1, 20, 64, 1000])
@pytest.mark.parametrize("spec", [QuantSpec(4, 64), QuantSpec(3), QuantSpec(4, 40, True)], ids=str)
@pytest.mark.parametrize("order", ["input", "activation", "static"])
def test_wide_and_narrow_blocks_differ_by_rounding_only(block_size, spec, order) -> None:
    weight, hessian = torch.randn(24, 150), hessian_of(correlated(600, 150))

    def quantized(settings: GptqSettings) -> torch.Tensor:
        codes, scale, zero, g_idx = gptq(weight, factorize(hessian, settings, "layer"), spec, settings)
        groups = torch.arange(150) // spec.group_length(150) if g_idx is None else g_idx.long()
        return scale.float()[:, groups] * (codes.float() - zero.float()[:, groups])

    usual, got = quantized(GptqSettings(order=order)), quantized(GptqSettings(order=order, block_size=block_size))
    assert ((usual - got).abs().amax(1) < 1e-3).float().mean() >= 0.7
    ours, theirs = (weighted_error(weight, w, hessian) for w in (got, usual))
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("group_size", [-1, 16, 64, 160])
@pytest.mark.parametrize("symmetric", [False, True])
def test_percentiles_leave_out_the_ends_of_a_group(group_size, symmetric) -> None:
    spec = QuantSpec(4, group_size, symmetric)
    hessian, weight = hessian_of(correlated(900, 300)), torch.randn(24, 300)
    settings = GptqSettings(grid="percentile", percentile=95)
    got = gptq(weight, factorize(hessian, settings, "layer"), spec, settings).dequantize(spec)
    expected = gptq_plain(weight, hessian, spec, settings.damping, beyond=0.05)
    assert ((got.double() - expected).abs().amax(1) < 1e-3).float().mean() >= 0.7
    ours, theirs = (weighted_error(weight, w, hessian) for w in (got, expected.float()))
    assert ours == pytest.approx(theirs, rel=0.1)


def test_the_hundredth_percentile_is_the_extremes() -> None:
    hessian, weight = hessian_of(correlated(600, 200)), torch.randn(24, 200)
    for rounds in (0, 1):
        settings = [GptqSettings(grid="percentile", percentile=100, rounds=rounds), GptqSettings(rounds=rounds)]
        factor = factorize(hessian, SETTINGS, "layer")
        first, second = (gptq(weight, factor, QuantSpec(3, 64), each) for each in settings)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("percentile", [50, 100.1, float("nan")])
def test_percentiles_out_of_range_are_refused(percentile) -> None:
    with pytest.raises(ValueError, match="percentile must be above 50 and at most 100, got"):
        GptqSettings(percentile=percentile)


@pytest.mark.parametrize("block_size", [0, -128, 2.5])
def test_block_sizes_out_of_range_are_refused(block_size) -> None:
    with pytest.raises(ValueError, match="block_size must be an integer of at least 1, got"):
        GptqSettings(block_size=block_size)


@pytest.mark.parametrize("damping", [0.0, -1.0, 2.0])
def test_damping_out_of_range_is_refused(damping) -> None:
    with pytest.raises(ValueError, match="damping must be above 0 and at most 1, got"):
        GptqSettings(damping)


def test_the_same_input_gives_the_same_codes() -> None:
    weight, hessian = torch.randn(16, 200), hessian_of(correlated(300, 200))
    spec = QuantSpec(3, 64)
    first, second = (gptq(weight, factorize(hessian, SETTINGS, "layer"), spec) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("settings", [GptqSettings(), GptqSettings(order="activation"), GptqSettings().beyond()])
def test_layers_of_one_input_come_out_as_each_alone(settings) -> None:
    factor, spec = factorize(hessian_of(correlated(500, 160)), settings, "layer"), QuantSpec(3, 64)
    weights = [torch.randn(n, 160) * size for n, size in ((24, 1.0), (8, 1e-7), (17, 3.0), (1, 1.0))]
    weights.insert(1, torch.randn(5, 160).bfloat16())
    (together,) = gptq_together([(weights, lambda: factor)], spec, settings)
    assert [found.scale.dtype for found in together] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float16,
        torch.float16,
    ]
    for weight, found in zip(weights, together, strict=True):
        alone = gptq(weight, factor, spec, settings)
        assert (found.codes == alone.codes).float().mean() > 0.99  # a product of more rows may round otherwise
        assert (found.scale == alone.scale).float().mean() > 0.99


SIDE_BY_SIDE = [
    (QuantSpec(4, 32), GptqSettings()),
    (QuantSpec(3, -1, True), GptqSettings(order="activation")),
    (QuantSpec(2, 200), GptqSettings(grid="search")),
    (QuantSpec(4, 64), GptqSettings(order="activation", grid="percentile", block_size=48)),
]


@pytest.mark.parametrize(("spec", "settings"), SIDE_BY_SIDE, ids=str)
def test_layers_of_one_shape_go_side_by_side_to_the_same_codes(spec, settings) -> None:
    k = 160
    factors = [factorize(hessian_of(correlated(400, k)), settings, "layer") for _ in range(3)]
    weights = [torch.randn(21, k) for _ in range(3)]
    for weight, factor, found in zip(
        weights, factors, gptq_side_by_side(weights, factors, spec, settings), strict=True
    ):
        alone = gptq(weight, factor, spec, settings)
        assert found.scale.shape == alone.scale.shape and found.scale.dtype == alone.scale.dtype
        assert (found.codes == alone.codes).float().mean() > 0.98  # batched products may round otherwise
        assert (found.g_idx is None) == (alone.g_idx is None)
        assert found.g_idx is None or torch.equal(found.g_idx, alone.g_idx)
        errors = [weighted_error(weight, one.dequantize(spec), factor.hessian) for one in (found, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_what_has_one_shape_is_found_among_the_readings() -> None:
    """Two inputs with 5 + 7 and 12 rows, one with 6 alone: two passes, and the first of both."""
    spec, launches = QuantSpec(4, 16), []
    readings = [([torch.randn(n, 64) for n in rows], hessian_of(correlated(200, 64))) for rows in ((5, 7), (12,), (6,))]
    factors = [factorize(hessian, SETTINGS, "layer") for _, hessian in readings]
    work = [(weights, lambda f=factor: f) for (weights, _), factor in zip(readings, factors, strict=True)]

    def watched(device: torch.device, settings: GptqSettings) -> bool:
        launches.append(device)
        return True

    apart, together = gptq_together(work, spec), gptq_together(work, spec, side_by_side=watched)
    assert len(launches) == 1
    for one, other in zip(apart, together, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.codes == b.codes).float().mean() > 0.98 and a.scale.shape == b.scale.shape
    assert not pays(torch.device("cpu"), SETTINGS) and pays(torch.device("cuda"), SETTINGS)
    assert not pays(torch.device("cuda"), SETTINGS.beyond()) and not pays(
        torch.device("cuda"), GptqSettings(order="static")
    )
