"""AWQ on a block of each component of the trained miniature, against the paper's search written plainly and densely."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_awq import rounded_by_hand
from torch import Tensor, nn

from mmq_kernels import checkpoint
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.models import make_plan
from mmq_kernels.quantize import Recipe, Stage, quantize_stages
from mmq_kernels.quantize.walk import Walk, record

COMPONENTS = ("vision", "connector", "language")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list:
    size = WorldSize(train=12, images=2, questions=2, gallery=2)
    world = write_world(tmp_path_factory.mktemp("awq") / "world", seed=8, size=size)
    source = CalibrationSource.parse([f"caption:{world / 'coco'}", f"vqa:{world / 'vqav2'}"], 12)
    folder = weights_folder("blip2")
    return list(source.batches(checkpoint.load(folder, dtype=torch.float32), checkpoint.load_processor(folder)))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True))


def readers(block: nn.Module, names: list[str], run) -> list[tuple[list[nn.Linear], Tensor]]:
    """The linears that read one input, in order, and all rows of that input."""
    groups: dict[int, list[str]] = {}
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        if not rows[name]:
            groups.setdefault(args[0].data_ptr(), []).append(name)
        rows[name].append(args[0].reshape(-1, args[0].shape[-1]))

    hooks = [block.get_submodule(name).register_forward_pre_hook(partial(watch, name=name)) for name in names]
    run()
    for hook in hooks:
        hook.remove()
    return [([block.get_submodule(name) for name in own], torch.cat(rows[own[0]])) for own in groups.values()]


def scale_by_hand(linears: list[nn.Linear], x: Tensor, judge) -> Tensor:
    """``x_mean^a / w_mean^(1-a)`` with the least error of the block's outputs, a in twenty steps from 0 to 1."""
    kept = [linear.weight.data for linear in linears]
    groups = torch.cat(kept).reshape(sum(map(len, kept)), -1, 64).abs()
    w_mean = (groups / groups.amax(2, keepdim=True)).flatten(1).mean(0).clamp(min=1e-4)
    best, least = torch.ones(x.shape[1]), float("inf")
    for step in range(21):
        scale = x.abs().mean(0).clamp(min=1e-4) ** (step / 20) / w_mean ** (1 - step / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = rounded_by_hand(weight, scale)
        lost = judge()
        if lost < least:
            best, least = scale, lost
    for linear, weight in zip(linears, kept, strict=True):
        linear.weight.data = weight
    return best


def clipped_by_hand(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """Each row's groups of ``W * s`` cut off where their share of the output, on the scaled input, is best."""
    scaled, x = weight * scale, x / scale
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[1], 64):
        part, seen = scaled[:, start : start + 64], x[:, start : start + 64]
        least = torch.full((len(weight),), float("inf"))
        for share in range(11):
            limits = [ends * (1 - share / 20) for ends in (part.amin(1).clamp(max=0), part.amax(1).clamp(min=0))]
            step = ((limits[1] - limits[0]) / 7).half().float()[:, None]
            zero = (-limits[0][:, None] / step).round().clamp(0, 7)
            back = step * (((part / step).round() + zero).clamp(0, 7) - zero)
            lost = ((back - part) @ seen.t()).square().sum(1)
            out[:, start : start + 64] = torch.where((lost < least)[:, None], back, out[:, start : start + 64])
            least = torch.minimum(lost, least)
    return out / scale


def by_hand(model: nn.Module, walk: Walk, block: str, names: list[str], expected: list[Tensor]) -> float:
    """The paper's search on every input of a block, then its clipping, then all layers rounded."""
    module = model.get_submodule(block)
    run = partial(walk.outputs, model, 0)
    found = readers(module, names, run)
    scales = [scale_by_hand(linears, x, lambda: error(run(), expected)) for linears, x in found]
    for (linears, x), scale in zip(found, scales, strict=True):
        for linear in linears:
            linear.weight.data = clipped_by_hand(linear.weight.data, scale, x)
    return error(run(), expected)


@pytest.mark.parametrize("component", COMPONENTS)
@torch.no_grad()
def test_a_block_of_each_component_loses_no_more_than_by_the_papers_search(component: str, calls: list) -> None:
    losses = {}
    for method in ("rtn", "awq", "by hand"):
        model = checkpoint.load(weights_folder("blip2"), dtype=torch.float32).requires_grad_(False)
        plan = make_plan(model, Recipe.parse(f"{component}={'rtn' if method == 'rtn' else 'awq'}:3:g64"))
        whole = next(stage for stage in plan.stages if len(stage.blocks) > 1 and stage.jobs[0])
        stage = Stage(whole.name, whole.blocks[:1], whole.jobs[:1], whole.once)
        walk = record(model, stage, calls)
        expected = walk.outputs(model, 0)
        if method == "by hand":
            names = [job.name.removeprefix(f"{stage.blocks[0]}.") for job in stage.jobs[0]]
            losses[method] = by_hand(model, walk, stage.blocks[0], names, expected)
        else:
            quantize_stages(model, [stage], calls)
            losses[method] = error(walk.outputs(model, 0), expected)
    assert losses["awq"] <= 1.01 * losses["by hand"], losses
    assert losses["awq"] < losses["rtn"], losses
