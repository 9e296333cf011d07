"""GPTQ that makes good, in each block, what the quantized blocks before it did to its inputs."""

from __future__ import annotations

import copy

import pytest
import tiny_vlms
import torch
from test_gptq import correlated
from torch import Tensor

from mmq_kernels import checkpoint
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.models import quantize_model
from mmq_kernels.quantize import GptqSettings, Hessian
from mmq_kernels.quantize.gptq import caught_up
from mmq_kernels.quantize.hessian import factorize


@pytest.mark.parametrize("order", ["input", "activation"])
def test_the_weight_is_the_one_of_least_squares(order) -> None:
    wanted = correlated(400, 48)
    x = wanted + 0.3 * torch.randn(400, 48)
    hessian = Hessian(48, x.device)
    assert hessian.drift() is None
    for part in (slice(0, 150), slice(150, 400)):
        hessian.add(x[part])
        hessian.add_drift(wanted[part], x[part])
    weight = torch.randn(20, 48)
    factor = factorize(hessian.value(), GptqSettings(order=order), "layer")
    damped = torch.cat([x, torch.eye(48) * (factor.damping * hessian.value().diagonal().mean() * 200).sqrt()]).double()
    target = torch.cat([wanted @ weight.t(), damped[400:].float() @ weight.t()]).double()
    solution = torch.linalg.lstsq(damped, target).solution.t()
    drift = hessian.drift()
    assert drift is not None
    for share in (0.0, 0.5, 1.0):
        expected = weight + share * (solution - weight)
        got = caught_up(weight, drift, factor, share)
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_trained_language_model_loses_less(tmp_path) -> None:
    """On the samples it was calibrated on and on others."""
    world = write_world(tmp_path / "world", seed=8, size=WorldSize(train=48, images=2, questions=2, gallery=2))
    source = CalibrationSource.parse([f"caption:{world / 'coco'}", f"vqa:{world / 'vqav2'}"], 96)
    folder = weights_folder("blip2")
    original = checkpoint.load(folder, dtype=torch.float32)
    calls = list(source.batches(original, checkpoint.load_processor(folder)))
    parts = calls[::2], calls[1::2]

    def outputs(model: torch.nn.Module, part: list) -> list[Tensor]:
        with torch.no_grad():
            return [model(**call).logits for call in part]

    lost = {}
    for share in (0.0, 0.5):
        model = copy.deepcopy(original)
        quantize_model(model, "language=gptq:3:g64", parts[0], settings=GptqSettings(catch_up=share))
        lost[share] = [
            sum(
                float((a - b).square().sum())
                for a, b in zip(outputs(model, part), outputs(original, part), strict=True)
            )
            for part in parts
        ]
    assert lost[0.5][0] < 0.9 * lost[0.0][0] and lost[0.5][1] < lost[0.0][1], lost


class Kept:
    """A store that forgets all but the first blocks."""

    def __init__(self, most: int, blocks: dict | None = None) -> None:
        self.most, self.blocks = most, blocks or {}

    def load(self, block: str):
        return self.blocks.get(block)

    def save(self, block: str, layers, reports) -> None:
        if len(self.blocks) < self.most:
            self.blocks[block] = copy.deepcopy((layers, reports))


def test_a_run_that_goes_on_keeps_track_too() -> None:
    settings, recipe = GptqSettings(catch_up=0.5), "vision=gptq:2:g16 language=gptq:2:g16"
    original, store = tiny_vlms.make("opt"), Kept(3)
    data = tiny_vlms.batches(original)
    found = []
    for own, used in ((store, settings), (Kept(0, store.blocks), settings), (Kept(0), GptqSettings())):
        model = copy.deepcopy(original)
        quantize_model(model, recipe, data, settings=used, store=own)
        found.append(model.state_dict())
    assert len(store.blocks) == 3
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert any(not torch.equal(tensor, found[2][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_shares_out_of_range_are_refused(share) -> None:
    with pytest.raises(ValueError, match=f"catch_up must be from 0 to 1, got {share}"):
        GptqSettings(catch_up=share)
