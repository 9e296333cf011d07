"""What makes GPTQ better than GPTQ: order of columns, searched grids, descent behind it; and the method "gptq+"."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from test_gptq import correlated, gptq_plain, hessian_of
from tiny_vlms import assert_same_outputs, batches, make
from torch import Tensor

from mmq_kernels import _native, backends, checkpoint, ops
from mmq_kernels.backends.descent import _Group
from mmq_kernels.models import quantize_model
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import GptqSettings, Quantized, gptq, quantize_weight
from mmq_kernels.quantize.gptq import weighted_error
from mmq_kernels.quantize.hessian import factorize
from mmq_kernels.quantize.refine import Refined, best_of, refine, row_errors
from mmq_kernels.spec import QuantSpec

ACTIVATION = GptqSettings(order="activation")
BEYOND = GptqSettings().beyond()
SETTINGS = [QuantSpec(4, 128, True), QuantSpec(3, 128), QuantSpec(2, 32)]


@cache
def layer(k: int = 256, n: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and the Hessians of two halves of the same activations, some channels far larger than others."""
    torch.manual_seed(5)
    x = correlated(1200, k) * 10 ** torch.randn(k).mul(0.4)
    return torch.randn(n, k) * 0.05, hessian_of(x[:600]), hessian_of(x[600:])


def error(weight: Tensor, found: Quantized, spec: QuantSpec, hessian: Tensor) -> float:
    return weighted_error(weight, found.dequantize(spec), hessian)


def begun(weight: Tensor, found: Quantized, spec: QuantSpec, hessian: Tensor) -> Refined:
    return Refined(found, row_errors(weight, found, spec, hessian))


def damped(hessian: Tensor) -> Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [QuantSpec(3, 64), QuantSpec(4, -1, True), QuantSpec(3, 48)], ids=str)
def test_activation_order_is_gptq_on_sorted_columns(spec) -> None:
    weight, hessian, _ = layer()
    order = torch.argsort(hessian.diagonal(), descending=True)
    found = gptq(weight, factorize(hessian, ACTIVATION, "layer"), spec, ACTIVATION)
    expected = torch.empty_like(weight)
    expected[:, order] = gptq_plain(weight[:, order], hessian[order][:, order], spec, 0.01).float()
    same = (found.dequantize(spec) - expected).abs().amax(1) < 1e-4
    assert same.float().mean() >= 0.7  # a code on the edge leads its row elsewhere
    assert error(weight, found, spec, hessian) == pytest.approx(weighted_error(weight, expected, hessian), rel=0.05)
    if spec.groups(256) == 1:
        assert found.g_idx is None
    else:
        assert torch.equal(found.g_idx[order], torch.arange(256, dtype=torch.int32) // spec.group_size)


def test_activation_order_helps_where_channels_differ() -> None:
    weight, hessian, held_out = layer()
    spec = QuantSpec(3, 128)
    for judge in (hessian, held_out):
        plain = gptq(weight, factorize(hessian, GptqSettings(), "layer"), spec)
        ordered = gptq(weight, factorize(hessian, ACTIVATION, "layer"), spec, ACTIVATION)
        assert error(weight, ordered, spec, judge) < 0.9 * error(weight, plain, spec, judge)


def test_a_layer_made_of_it_computes_what_was_optimized() -> None:
    weight, hessian, _ = layer()
    for spec in (QuantSpec(3, 32), QuantSpec(5, -1), QuantSpec(4, 96, True)):
        found = gptq(weight, factorize(hessian, BEYOND, "layer"), spec, BEYOND)
        packed = QuantLinear.from_codes(found.codes, found.scale, found.zero, spec, g_idx=found.g_idx)
        assert torch.equal(packed.dequantize(), found.dequantize(spec))


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_searched_grid_is_never_worse_than_the_extremes(bits, symmetric) -> None:
    spec = QuantSpec(bits, -1, symmetric)
    weight, importance = torch.randn(300, 64) ** 3, torch.rand(64) + 0.1
    scale, zero = ops.search_grid(weight, importance, spec, torch.float16)
    codes = ((weight / scale.float()[:, None]).round() + zero.float()[:, None]).clamp(0, spec.max_code)
    back = scale.float()[:, None] * (codes - zero.float()[:, None])
    searched = ((back - weight).square() * importance).sum(1)
    nearest = quantize_weight(weight, spec).dequantize(spec)
    extremes = ((nearest - weight).square() * importance).sum(1)
    assert (searched <= extremes * 1.001).all()
    if bits < 8:
        assert searched.sum() < 0.98 * extremes.sum()


def test_rows_that_are_searched_in_slices_get_the_same_grids(monkeypatch) -> None:
    from mmq_kernels.backends import descent

    weight, importance, spec = torch.randn(40, 24), torch.rand(24) + 0.1, QuantSpec(3)
    with ops.use_backend("reference"):
        whole = ops.search_grid(weight, importance, spec, torch.float16)
        monkeypatch.setattr(descent, "_WEIGHTS_AT_ONCE", {"cpu": 100})
        sliced = ops.search_grid(weight, importance, spec, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


def test_hard_groups_have_finite_grids() -> None:
    weight = torch.stack([torch.zeros(16), torch.full((16,), 3.0), torch.full((16,), -1e-9), torch.rand(16)])
    for spec in (QuantSpec(2), QuantSpec(4, -1, True)):
        scale, zero = ops.search_grid(weight, torch.ones(16), spec, torch.float16)
        assert scale.isfinite().all() and (scale > 0).all() and (zero <= spec.max_code).all()


# --- descent ----------------------------------------------------------------------------------------------------------


def descended(weight: Tensor, hessian: Tensor, found: Quantized, spec: QuantSpec) -> Tensor:
    """One column after another set to its best code, with everything in plain float64."""
    w, h = weight.double(), hessian.double()
    scale, zero = found.scale.double(), found.zero.double()
    dense, codes = scale * (found.codes.double() - zero), found.codes.double().clone()
    for j in range(w.shape[1]):
        gradient = ((dense - w) @ h)[:, j]
        wanted = dense[:, j] - gradient / h[j, j]
        codes[:, j] = ((wanted / scale[:, 0]).round() + zero[:, 0]).clamp(0, spec.max_code)
        dense[:, j] = scale[:, 0] * (codes[:, j] - zero[:, 0])
    return codes


@pytest.mark.parametrize("k", [40, 128, 200])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_move_as_in_plain_coordinate_descent(k, symmetric) -> None:
    spec = QuantSpec(3, -1, symmetric)
    hessian = damped(hessian_of(correlated(400, k)))
    weight = torch.randn(32, k)
    start = quantize_weight(weight, spec)
    gradient = (start.dequantize(spec) - weight) @ hessian
    group = _Group(start.codes, start.scale[:, 0].float(), start.zero[:, 0].float(), hessian, gradient.clone())
    group.move_codes(spec, start.scale.dtype, backends.backend("reference").gptq_block)
    expected = descended(weight, hessian, start, spec)
    assert (group.codes == expected).float().mean() > 0.995
    assert (expected != start.codes).float().mean() > 0.05, "or nothing had to move"
    torch.testing.assert_close(group.gradient, (group.dense() - weight) @ hessian, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", SETTINGS, ids=str)
def test_no_row_gets_worse_and_errors_are_those_of_the_result(spec) -> None:
    weight, hessian, _ = layer()
    hessian = damped(hessian)
    start = quantize_weight(weight, spec)
    found = refine(weight, hessian, begun(weight, start, spec, hessian), spec, 2)

    def rows(quantized: Quantized) -> Tensor:
        difference = quantized.dequantize(spec).double() - weight.double()
        return ((difference @ hessian.double()) * difference).sum(1)

    assert (rows(found.weight) <= rows(start) * (1 + 1e-5)).all()
    assert rows(found.weight).sum() < 0.5 * rows(start).sum()
    torch.testing.assert_close(found.errors.double(), rows(found.weight), rtol=1e-3, atol=0)
    more = refine(weight, hessian, begun(weight, start, spec, hessian), spec, 4)
    assert more.errors.sum() <= found.errors.sum() * (1 + 1e-5)


def test_scales_stop_where_no_step_helps() -> None:
    """At the optimum of a scale, one step of its dtype in either direction makes its row worse."""
    spec = QuantSpec(3)
    weight, hessian = torch.randn(16, 64), damped(hessian_of(correlated(300, 64)))
    start = quantize_weight(weight, spec)
    gradient = (start.dequantize(spec) - weight) @ hessian
    group = _Group(start.codes, start.scale[:, 0].float(), start.zero[:, 0].float(), hessian, gradient)
    group.move_scale(torch.float16)
    direction = start.codes.double() - start.zero.double()

    def rows(scale: Tensor) -> Tensor:
        difference = scale.double()[:, None] * direction - weight.double()
        return ((difference @ hessian.double()) * difference).sum(1)

    assert torch.equal(group.scale, group.scale.half().float())
    assert (rows(group.scale) < rows(start.scale[:, 0].float())).all()
    for way in (0.0, torch.inf):
        neighbour = torch.nextafter(group.scale.half(), torch.tensor(way).half()).float()
        assert (rows(group.scale) <= rows(neighbour) * (1 + 1e-6)).all()


def test_the_better_of_two_is_taken_row_by_row() -> None:
    weight, hessian, _ = layer()
    spec, hessian = QuantSpec(2, 32), damped(hessian)
    start = quantize_weight(weight, spec)
    shuffled = start._replace(codes=start.codes.flip(1))
    one, other = (
        refine(weight, hessian, begun(weight, start, spec, hessian), spec, 1),
        refine(weight, hessian, begun(weight, shuffled, spec, hessian), spec, 1),
    )
    both = best_of(one, other)
    assert torch.equal(both.errors, torch.minimum(one.errors, other.errors))
    wins = other.errors < one.errors
    assert torch.equal(both.weight.codes, torch.where(wins[:, None], other.weight.codes, one.weight.codes))


# --- gptq+ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "share"), zip(SETTINGS, (0.92, 0.93, 0.75), strict=True), ids=str)
def test_gptq_plus_is_far_ahead_of_gptq_with_activation_order(spec, share) -> None:
    """On the inputs that it was calibrated on and on others (on trained layers: `benchmarks/gptq_error.py`)."""
    weight, hessian, held_out = layer()
    ordered = gptq(weight, factorize(hessian, ACTIVATION, "layer"), spec, ACTIVATION)
    better = gptq(weight, factorize(hessian, BEYOND, "layer"), spec, BEYOND)
    assert error(weight, better, spec, hessian) < share * error(weight, ordered, spec, hessian)
    assert error(weight, better, spec, held_out) < (share + 0.05) * error(weight, ordered, spec, held_out)


def test_settings_are_checked_by_name() -> None:
    with pytest.raises(ValueError, match="order must be one of input, activation, static, got 'desc'"):
        GptqSettings(order="desc")
    with pytest.raises(ValueError, match="grid must be one of minmax, percentile, search, got 'mse'"):
        GptqSettings(grid="mse")
    with pytest.raises(ValueError, match="rounds must be an integer of at least 0, got -1"):
        GptqSettings(rounds=-1)
    assert GptqSettings(0.01, "activation", "search", rounds=1) == BEYOND
    assert GptqSettings(damping=0.1, rounds=3).beyond() == GptqSettings(0.1, "activation", "search", rounds=3)
    assert GptqSettings(grid="percentile").beyond().grid == "percentile"


@pytest.mark.parametrize("kind", ["opt", "itm"])
def test_a_model_is_quantized_saved_and_loaded(kind, tmp_path) -> None:
    original = make(kind)
    plain, model = copy.deepcopy(original), copy.deepcopy(original)
    before = quantize_model(plain, "all=gptq:3:g16", batches(plain, 6)).layers
    report = quantize_model(model, "all=gptq+:3:g16", batches(model, 6))
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert any(module.activation_order for module in packed)
    calibrated = [i for i, row in enumerate(report.layers) if row.calibration_rows]
    assert {report.layers[i].used for i in calibrated} == {"gptq+"}
    first = calibrated[0]  # later layers see other inputs in the two models
    assert report.layers[first].error < before[first].error
    checkpoint.save(model, tmp_path / "out")
    assert_same_outputs(checkpoint.load(tmp_path / "out"), model)


# --- compiled kernels -------------------------------------------------------------------------------------------------

NATIVE = pytest.mark.skipif(backends.backend("cpu").why_unavailable() is not None, reason="no compiled kernels")
GROUPS = [
    (1, 1, 4, True, torch.float16),
    (7, 33, 2, False, torch.float16),
    (16, 128, 3, False, torch.bfloat16),
    (50, 96, 5, True, torch.float32),
    (33, 40, 8, False, torch.float32),
    (19, 130, 7, True, torch.bfloat16),
    (64, 32, 6, False, torch.float16),
]


def a_group(n: int, columns: int, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple:
    """Arguments of `ops.descend`, as slices of larger tensors, and the weight."""
    torch.manual_seed(columns)
    spec = QuantSpec(bits, -1, symmetric)
    weight = torch.randn(n, columns) * 0.05
    whole = damped(hessian_of(correlated(400, columns + 8)))
    hessian = whole[:columns, :columns]
    codes, scale, zero = ops.quantize_rtn(weight, spec, dtype)
    dense = scale.float() * (codes.float() - zero.float())
    gradient = torch.randn(n, columns + 5)
    gradient[:, :columns] = (dense - weight) @ hessian
    return weight, gradient[:, :columns], hessian, codes, scale[:, 0].float(), zero[:, 0], spec, dtype


@NATIVE
@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_compiled_descent_does_what_torch_does(case) -> None:
    """Sums differ in their order, so codes at the edge may; errors are what each says, and no worse than before."""
    weight, *arguments = a_group(*case)
    gradient, hessian, codes, scale, zero, spec, dtype = arguments
    before = [part.clone() for part in (gradient, codes, scale, zero)]
    dense = scale[:, None] * (codes.float() - zero[:, None].float())

    def rows(values: Tensor) -> Tensor:
        difference = values.double() - weight.double()
        return ((difference @ hessian.double()) * difference).sum(1)

    found = {}
    for name in ("cpu", "reference"):
        with ops.use_backend(name):
            found[name] = ops.descend(*arguments)
        after = found[name]
        values = after.scale[:, None] * (after.codes.float() - after.zero[:, None].float())
        torch.testing.assert_close(values - dense, after.moved, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after.gained.double(), rows(values) - rows(dense), rtol=1e-2, atol=1e-5)
        assert (rows(values) <= rows(dense) * (1 + 1e-5) + 1e-9).all()
        assert torch.equal(after.scale, after.scale.to(dtype).float()) and after.codes.max() <= spec.max_code
    assert all(torch.equal(part, kept) for part, kept in zip((gradient, codes, scale, zero), before, strict=True))
    one, other = found["cpu"], found["reference"]
    assert (one.codes == other.codes).float().mean() > 0.98
    assert (one.zero == other.zero).float().mean() > 0.9
    torch.testing.assert_close(one.scale, other.scale, rtol=2e-2, atol=0)


@NATIVE
@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_every_instruction_set_descends_alike(case, monkeypatch) -> None:
    weight, *arguments = a_group(*case)
    cpu = backends.backend("cpu")
    importance = torch.rand(weight.shape[1]) + 0.1
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for isa in _native.isas():
            found.append(
                (*cpu.descend(*arguments, isa=isa), *cpu.search_grid(weight, importance, *case_spec(case), isa))
            )
    assert len(found) >= 2
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def case_spec(case: tuple) -> tuple[QuantSpec, torch.dtype]:
    return QuantSpec(case[2], -1, case[3]), case[4]


@NATIVE
@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_compiled_search_does_what_torch_does(case) -> None:
    weight = torch.cat([a_group(*case)[0] ** 3, torch.zeros(2, case[1])])
    importance, (spec, dtype) = torch.rand(case[1]) + 0.1, case_spec(case)
    lost = []
    for name in ("cpu", "reference"):
        with ops.use_backend(name):
            scale, zero = ops.search_grid(weight, importance, spec, dtype)
        assert scale.dtype == dtype and zero.dtype == torch.uint8
        codes = ((weight / scale.float()[:, None]).round() + zero.float()[:, None]).clamp(0, spec.max_code)
        back = scale.float()[:, None] * (codes - zero.float()[:, None])
        lost.append(((back - weight).square() * importance).sum(1))
    torch.testing.assert_close(lost[0], lost[1], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gradient", lambda a: [a[0][:, 1:], *a[1:]]),
        ("hessian", lambda a: [a[0], a[1][1:], *a[2:]]),
        ("scale", lambda a: [*a[:3], a[3][1:], *a[4:]]),
        ("zero", lambda a: [*a[:4], a[4][1:], *a[5:]]),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, change) -> None:
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        ops.descend(*change(list(a_group(*GROUPS[1])[1:])))


# --- static groups ----------------------------------------------------------------------------------------------------


def static_by_hand(weight: Tensor, hessian: Tensor, spec: QuantSpec, damping: float) -> Tensor:
    """GPTQ in float64 as published, columns by activation, each on the grid that its group had to begin with."""
    k, length = weight.shape[1], spec.group_length(weight.shape[1])
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    h = hessian[order][:, order].double()
    h = h + damping * float(hessian.diagonal().mean()) * torch.eye(k)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    scale, zero = (grid.double() for grid in ops.quantize_rtn(weight, spec, torch.float16)[1:])
    w, back = weight.double()[:, order].clone(), torch.empty_like(weight, dtype=torch.float64)
    for j in range(k):
        s, z = scale[:, order[j] // length], zero[:, order[j] // length]
        quantized = s * (((w[:, j] / s).round() + z).clamp(0, spec.max_code) - z)
        back[:, order[j]] = quantized
        w[:, j + 1 :] -= ((w[:, j] - quantized) / upper[j, j])[:, None] * upper[j, j + 1 :]
    return back


@pytest.mark.parametrize("spec", [*SETTINGS, QuantSpec(4, 48), QuantSpec(3)], ids=str)
def test_static_groups_are_gptq_as_published(spec) -> None:
    weight, hessian, _ = layer()
    settings = GptqSettings(order="static")
    found = gptq(weight, factorize(hessian, settings, "layer"), spec, settings)
    assert found.g_idx is None
    expected = static_by_hand(weight, hessian, spec, settings.damping)
    ours, by_hand = (weighted_error(weight, back.float(), hessian) for back in (found.dequantize(spec), expected))
    assert abs(ours / by_hand - 1) < 0.01
    assert torch.isclose(found.dequantize(spec).double(), expected, atol=1e-6).float().mean() > 0.9


def test_static_groups_go_beyond_too() -> None:
    weight, hessian, _ = layer()
    spec = QuantSpec(2, 32)
    plain, more = GptqSettings(order="static"), GptqSettings(order="static").beyond()
    assert more.order == "static"
    errors = [
        error(weight, gptq(weight, factorize(hessian, settings, "layer"), spec, settings), spec, hessian)
        for settings in (plain, more)
    ]
    assert errors[1] < 0.8 * errors[0]
