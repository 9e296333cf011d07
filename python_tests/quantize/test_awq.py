"""AWQ against a plain version of the paper's search, and against the mistakes that others have made of it."""

from __future__ import annotations

import copy

import pytest
import torch
from test_gptq import correlated, hessian_of
from tiny_vlms import assert_same_outputs, batches, make
from torch import Tensor, nn

from mmq_kernels import checkpoint
from mmq_kernels.models import quantize_model
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import Job, Stage, quantize_stages, quantize_weight
from mmq_kernels.quantize.awq import ALPHAS, awq, channel_scale, search_scale, weight_magnitude
from mmq_kernels.quantize.gptq import weighted_error
from mmq_kernels.spec import QuantSpec

SPEC = QuantSpec(3, 64)


class Block(nn.Module):
    """A residual MLP whose first two layers read the same x."""

    def __init__(self, width: int = 128, inner: int = 192) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down(torch.nn.functional.silu(self.gate(hidden_states)) * self.up(hidden_states))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


LAYERS = ("gate", "up", "down")
STAGE = Stage(
    "blocks",
    ("blocks.0", "blocks.1"),
    tuple(tuple(Job(f"blocks.{i}.{name}", "awq", SPEC) for name in LAYERS) for i in range(2)),
)


def outlying(count: int = 6) -> list[dict[str, Tensor]]:
    """Inputs with a few channels far larger than the others, as in trained transformers."""
    size = torch.ones(128)
    size[torch.randperm(128)[:6]] = 25.0
    return [{"x": torch.randn(2, 20, 128) * size} for _ in range(count)]


def rounded_by_hand(weight: Tensor, scale: Tensor) -> Tensor:
    """Round to nearest of ``W * s`` in groups of 64, divided by s again; plain and in floating point."""
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[1], 64):
        part = weight[:, start : start + 64] * scale[start : start + 64]
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        step = ((high - low) / 7).half().float()
        zero = (-low / step).round().clamp(0, 7)
        out[:, start : start + 64] = step * (((part / step).round() + zero).clamp(0, 7) - zero)
    return out / scale


def plain_search(block: Block, names: tuple[str, ...], inputs: list[Tensor], seen: list[Tensor]) -> float:
    """The least error of the block's outputs over the exponents, everything dense, by the paper's formula."""
    expected = [block(x) for x in inputs]
    x_mean = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).abs().mean(0)
    weights = torch.cat([getattr(block, name).weight for name in names])
    groups = weights.reshape(len(weights), -1, 64).abs()
    w_mean = (groups / groups.amax(2, keepdim=True)).reshape(weights.shape).mean(0)
    best = float("inf")
    for alpha in ALPHAS:
        scale = x_mean**alpha / w_mean ** (1 - alpha)
        scale = scale / (scale.max() * scale.min()).sqrt()
        tried = copy.deepcopy(block)
        for name in names:
            getattr(tried, name).weight.data = rounded_by_hand(getattr(block, name).weight, scale)
        best = min(best, sum(float((tried(x) - y).square().sum()) for x, y in zip(inputs, expected, strict=True)))
    return best


@torch.no_grad()
def test_the_search_finds_what_a_plain_one_finds() -> None:
    model, data = Model().eval(), outlying()
    block, inputs = model.blocks[0], [batch["x"] for batch in data]
    for names, seen in ((("gate", "up"), inputs), (("down",), [_inner(block, x) for x in inputs])):
        linears = [getattr(block, name) for name in names]
        originals = [linear.weight.data for linear in linears]
        expected = [block(x) for x in inputs]

        def loss(weights, linears=linears, expected=expected) -> float:
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.data = weight
            return sum(float((block(x) - y).square().sum()) for x, y in zip(inputs, expected, strict=True))

        x_mean = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).abs().mean(0)
        scale = search_scale([(weight, SPEC) for weight in originals], x_mean, loss)
        found = loss([rounded_by_hand(weight, scale) for weight in originals])
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight.data = weight
        assert found <= 1.01 * plain_search(block, names, inputs, seen)


def _inner(block: Block, x: Tensor) -> Tensor:
    return torch.nn.functional.silu(block.gate(x)) * block.up(x)


def test_exponents_are_shares_and_scales_are_normalized() -> None:
    assert min(ALPHAS) == 0 and max(ALPHAS) == 1
    x_mean, w_mean = torch.rand(64) * 10, torch.rand(64)
    for alpha in ALPHAS:
        scale = channel_scale(x_mean, w_mean, alpha, torch.float32)
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-4)
    assert not torch.equal(
        channel_scale(x_mean, w_mean, 0.5, torch.float32), channel_scale(x_mean, x_mean, 0.5, torch.float32)
    )
    silent = channel_scale(torch.zeros(8), torch.zeros(8), 0.5, torch.float16)
    assert silent.isfinite().all() and (silent > 0).all()


def test_the_mean_of_weights_is_over_all_layers_and_by_group() -> None:
    a, b = torch.tensor([[1.0, -2.0, 4.0, 1.0]]), torch.tensor([[8.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    found = weight_magnitude([(a, QuantSpec(4, -1)), (b, QuantSpec(4, -1))])
    assert torch.allclose(found, torch.tensor([0.25 + 1 + 0, 0.5, 1 + 0 + 1, 0.25 + 0 + 1]) / 3)
    wide = torch.cat([torch.full((1, 8), 2.0), torch.full((1, 4), 5.0)], 1)
    assert torch.allclose(weight_magnitude([(wide, QuantSpec(4, 8))]), torch.ones(12)), "a ragged last group is its own"


@torch.no_grad()
def test_every_sample_counts() -> None:
    """The channels that matter are large in the second sample only; the first alone would choose otherwise."""
    torch.manual_seed(3)
    quiet, loud = torch.randn(2, 20, 128) * 0.1, torch.randn(2, 20, 128)
    loud[..., :4] *= 60
    found = {}
    for name, data in (("both", [{"x": quiet}, {"x": loud}]), ("first", [{"x": quiet}])):
        torch.manual_seed(4)
        model = Model().eval()
        quantize_stages(model, [STAGE], data)
        found[name] = model.blocks[0].gate.weight_input_scale
    others = found["both"][4:].mean()
    assert found["both"][:4].mean() > 2 * others
    assert found["first"][:4].mean() < 2 * found["first"][4:].mean()


@torch.no_grad()
def test_layers_with_one_input_share_their_scale_and_blocks_lose_less() -> None:
    original = Model().eval()
    drawn = outlying(10)
    data, others = drawn[:6], drawn[6:]
    lost = {}
    for method in ("rtn", "awq"):
        model = copy.deepcopy(original)
        jobs = tuple(tuple(Job(job.name, method, SPEC) for job in block) for block in STAGE.jobs)
        reports = quantize_stages(model, [Stage("blocks", STAGE.blocks, jobs)], data)
        lost[method] = sum(float((model(**batch) - original(**batch)).square().sum()) for batch in others)
        assert {report.used for report in reports} == {method}
    assert lost["awq"] < 0.7 * lost["rtn"]
    for block in model.blocks:
        assert torch.equal(block.gate.weight_input_scale, block.up.weight_input_scale)
        assert not torch.equal(block.gate.weight_input_scale, torch.ones(128))
        assert block.down.weight_input_scale is None  # `up`, whose outputs only meet a factor, has taken it


def test_what_is_stored_computes_what_was_judged() -> None:
    """``(x / s) @ Q(W s)^T``: the scale is undone on the inputs, and clipping saw scaled weights with scaled inputs."""
    x = correlated(500, 128)
    weight, hessian = torch.randn(24, 128), hessian_of(x)
    scale = channel_scale(x.abs().mean(0), weight_magnitude([(weight, SPEC)]), 0.5, torch.float32)
    found = awq(weight, hessian, scale, SPEC)
    layer = QuantLinear.from_codes(found.codes, found.scale, found.zero, SPEC, input_scale=scale)
    lost = (layer(x) - x @ weight.t()).square().sum() / (x @ weight.t()).square().sum()
    judged = weighted_error(weight, found.dequantize(SPEC) / scale, hessian)
    assert float(lost) == pytest.approx(judged, rel=1e-2)
    unclipped = quantize_weight(weight * scale, SPEC).dequantize(SPEC) / scale
    assert judged <= weighted_error(weight, unclipped, hessian) * (1 + 1e-5)


def test_weights_that_are_not_finite_are_named() -> None:
    weight = torch.randn(4, 64)
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite, got 1 values"):
        awq(weight, torch.eye(64), torch.ones(64), SPEC)


@pytest.mark.parametrize("kind", ["opt", "t5", "itm"])
def test_a_model_is_quantized_saved_and_loaded(kind, tmp_path) -> None:
    original = make(kind)
    model = copy.deepcopy(original)
    report = quantize_model(model, "all=awq:4:g16", batches(model, 2))
    for row in report.layers:
        layer = model.get_submodule(row.name)
        seen = row.calibration_rows > 0
        assert (row.used == "awq") == seen
        assert (layer.weight_input_scale is not None) == (seen and not row.folded_into)
        if not seen:
            assert row.note == "no calibration data reached this layer"
    checkpoint.save(model, tmp_path / "out")
    assert_same_outputs(checkpoint.load(tmp_path / "out"), model)
    folded = {row.folded_into for row in report.layers}
    assert folded - {""}
    for name, parameter in original.named_parameters():
        found = dict(model.named_parameters()).get(name)
        if name.rpartition(".")[0] not in folded:
            assert found is None or torch.equal(found, parameter), f"{name} was changed by the search"
