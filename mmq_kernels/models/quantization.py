"""`quantize_model`: a model, a recipe and calibration batches in; packed layers and a report out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mmq_kernels.models.plan import make_plan
from mmq_kernels.models.tied import untie_heads
from mmq_kernels.quantize.recipe import Recipe
from mmq_kernels.quantize.sequential import Batch, BlockStore, Hold, LayerReport, Progress, in_memory, quantize_stages
from mmq_kernels.quantize.settings import GptqSettings


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` did.

    Attributes:
        recipe: in its one-line form.
        layers: one report a quantized layer.
        left_alone: the other linears, and why.
    """

    recipe: str
    layers: list[LayerReport]
    left_alone: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """Everything that did not go as asked, one line a layer."""
        return [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "layers": [layer.to_json() for layer in self.layers],
            "left_alone": self.left_alone,
        }


def quantize_model(
    model: nn.Module,
    recipe: Recipe | str,
    batches: Iterable[Batch] = (),
    *,
    settings: GptqSettings = GptqSettings(),  # noqa: B008 (frozen)
    store: BlockStore | None = None,
    hold: Hold = in_memory,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Replace the linears that a recipe selects by packed ones, in place.

    Args:
        model: a transformers model of a known family.
        recipe: see `mmq_kernels.quantize.recipe`.
        batches: calibration, keyword arguments of calls of `model`; needed by gptq.
        settings: of GPTQ.
        store: keeps finished blocks, so that a killed run can go on.
        hold: brings a block's tensors in, for a model that is not all in memory.
        progress: told (blocks done, blocks in all, name).

    Raises:
        ValueError: for a recipe that does not fit the model, or gptq without batches.
        QuantizationError: naming the layer that failed.
    """
    recipe = Recipe.parse(recipe)
    plan = make_plan(model, recipe)
    batches = list(batches)
    if any(stage.needs_data for stage in plan.stages) and not batches:
        raise ValueError(f"gptq needs calibration batches, got none ({recipe})")
    model.eval()
    tied = set(untie_heads(model, plan.layers))
    reports = quantize_stages(model, plan.stages, batches, settings=settings, store=store, hold=hold, progress=progress)
    reports = [
        replace(r, note=f"{r.note} untied from the embedding, which keeps its weights".strip()) if r.name in tied else r
        for r in reports
    ]
    return QuantizationReport(str(recipe), reports, plan.left_alone)
