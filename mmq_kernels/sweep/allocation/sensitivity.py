"""What quantizing one unit alone does: to the output of its block, and to the output of the model.

The float model is walked through once, block by block, on the calibration samples. In each block, each unit in turn is
quantized with each choice, calibrated on the float model's activations, and taken back. The block's own output says
how far off that is,

    output_error = ||block'(x) - block(x)||^2 / ||block(x)||^2,

and costs a block; the model's own output says what that means (`scoring.Probe`), and costs a pass of the model over
some samples. So that can be measured for some choices, and inferred for the others (`search.error_models`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels.models import make_plan
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import GptqSettings, Stage
from mmq_kernels.quantize.sequential import Batch, Job, quantize_block
from mmq_kernels.quantize.walk import Walk, frozen, record, without_cache
from mmq_kernels.spec import QuantSpec
from mmq_kernels.sweep.allocation.measurements import Measurements
from mmq_kernels.sweep.allocation.units import Choice, Unit, named, recipe_of

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sensitivity:
    """Of one unit with one choice.

    Attributes:
        output_error: squared error of the block's output, as a share of that output.
        bits: that its layers' weights take, as measured.
        deviation: of the model's output with this unit alone quantized; None where it was not measured.
    """

    output_error: float
    bits: int
    deviation: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Table = list[list[Sensitivity | None]]
"""For each unit a row of its choices; None for leaving it alone."""


def measure_alone(
    model: nn.Module,
    units: Sequence[Unit],
    choices: Sequence[Choice],
    batches: Sequence[Batch],
    *,
    method: str,
    settings: GptqSettings,
    deviation: Callable[[nn.Module], float],
    at: Sequence[Choice],
    kept: Measurements,
    progress: Progress | None = None,
) -> Table:
    """Sensitivities of all units and choices.

    Args:
        model: float; as it was when this returns.
        batches: calibration.
        deviation: of a model's output.
        at: the choices for which that is measured too.
        kept: what is in it is not measured again; new measurements go there, one by one.
        progress: told (done, in all, unit).
    """
    specs = [choice for choice in choices if choice is not None]
    found = {
        (unit.name, spec): Sensitivity(**value)
        for unit in units
        for spec in specs
        if (value := _known(kept, unit, spec, spec in at)) is not None
    }
    done, in_all = len(found), len(units) * len(specs)
    for index, walk, jobs in _blocks(model, units, specs[0] if specs else None, method, batches, found, specs):
        block = walk.block(index)
        original, expected = model.get_submodule(block), _outputs(model, walk, index)
        with _undisturbed(model):
            hessians = walk.hessians(model, index, jobs)
        for unit in (unit for unit in units if unit.block == block):
            for spec in specs:
                if (unit.name, spec) in found:
                    continue
                own = [replace(job, spec=spec) for job in jobs if job.name in unit.layers]
                try:
                    model.set_submodule(block, copy.deepcopy(original))
                    with _undisturbed(model):
                        quantize_block(model, walk, index, own, settings, hessians)
                    error = _apart(_outputs(model, walk, index), expected)
                    moved = deviation(model) if spec in at else None
                    one = Sensitivity(error, _bits(model, unit), moved)
                finally:
                    model.set_submodule(block, original)
                kept.put(one.to_json(), **_what(unit, spec, spec in at))
                found[unit.name, spec] = one
                done += 1
                if progress:
                    progress(done, in_all, unit.name)
    return [[None if choice is None else found[unit.name, choice] for choice in choices] for unit in units]


def _known(kept: Measurements, unit: Unit, spec: QuantSpec, whole: bool) -> Any:
    return kept.get(**_what(unit, spec, whole))


def _what(unit: Unit, spec: QuantSpec, whole: bool) -> dict[str, Any]:
    return {"measured": "alone", "unit": unit.name, "choice": named(spec), "model": whole}


def _blocks(
    model: nn.Module,
    units: Sequence[Unit],
    spec: QuantSpec | None,
    method: str,
    batches: Sequence[Batch],
    found: dict[tuple[str, QuantSpec], Sensitivity],
    specs: Sequence[QuantSpec],
) -> Iterator[tuple[int, Walk, Sequence[Job]]]:
    """The blocks with something left to measure, each with its float inputs, in the order in which they run."""
    if spec is None:
        return
    open_blocks = {unit.block for unit in units for one in specs if (unit.name, one) not in found}
    for stage in make_plan(model, recipe_of(units, [spec] * len(units), method)).stages:
        wanted = [index for index, block in enumerate(stage.blocks) if block in open_blocks]
        walk: Walk | None = None
        for index in range(wanted[-1] + 1 if wanted else 0):
            if walk is None or index == walk.end:
                walk = _recorded(model, stage, batches, index)
            if index in wanted:
                yield index, walk, stage.jobs[index]
            with _undisturbed(model):
                walk.advance(model, index)


def _recorded(model: nn.Module, stage: Stage, batches: Sequence[Batch], start: int) -> Walk:
    with _undisturbed(model):
        return record(model, stage, batches, start)


def _outputs(model: nn.Module, walk: Walk, index: int) -> list[Tensor]:
    with _undisturbed(model):
        return walk.outputs(model, index)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, no caches; only while blocks are run one by one: evaluation needs its caches."""
    with torch.no_grad(), without_cache(model), frozen(model):
        yield


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    lost = whole = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        lost += float((ours.float() - theirs.float()).square().sum(dtype=torch.float64))
        whole += float(theirs.float().square().sum(dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0


def _bits(model: nn.Module, unit: Unit) -> int:
    layers = [model.get_submodule(name) for name in unit.layers]
    return 8 * sum(layer.packed_bytes for layer in layers if isinstance(layer, QuantLinear))
