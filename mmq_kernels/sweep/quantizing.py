"""One model in memory that becomes one configuration after the other, by the same steps as `quantize_model` takes.

What configurations have in common is done once: a block that another had made is put in place; a block that differs is
made on activations that were recorded for its neighbour, with its Hessians and their factors. The bits are those of
`mmq quantize`, which a test holds it to.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels.models.plan import Plan
from mmq_kernels.models.tied import untie_heads
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import GptqSettings
from mmq_kernels.quantize.recipe import CALIBRATED
from mmq_kernels.quantize.sequential import LayerReport, quantize_block
from mmq_kernels.quantize.walk import Batch, SharedHessian, Walk, frozen, record, without_cache
from mmq_kernels.sweep.shelf import Shelf, bytes_of
from mmq_kernels.sweep.tree import Step, node

StoredDtype = Callable[[str], torch.dtype | None]
"""Of a tensor of the model by its name: its dtype in a checkpoint, None where it is the one it has."""


@dataclass(frozen=True)
class Made:
    """A finished block.

    Attributes:
        layers: packed, by name in the model.
        parameters: of what took the layers' input scales, by name.
        reports: one a layer.
    """

    layers: Mapping[str, QuantLinear]
    parameters: Mapping[str, nn.Parameter]
    reports: tuple[LayerReport, ...]

    @property
    def nbytes(self) -> int:
        held = [*self.parameters.values()]
        return bytes_of(held) + sum(layer.packed_bytes for layer in self.layers.values())


class SharedQuantizer:
    """Quantizes a model by one plan after the other.

    Args:
        model: float, in memory; between configurations it is what it was.
        batches: gives the calibration batches; asked for once, when the first block needs them.
        settings: of GPTQ.
        shelf: where shared things are kept.
        stored: in which dtypes a checkpoint holds the model; what configurations are evaluated with is rounded to them.
    """

    def __init__(
        self,
        model: Any,
        batches: Callable[[], Sequence[Batch]],
        settings: GptqSettings,
        shelf: Shelf,
        stored: StoredDtype = lambda name: None,
    ) -> None:
        self.model, self._settings, self._shelf, self._stored = model, settings, shelf, stored
        self._make_batches = batches
        self._batches: list[Batch] | None = None
        self._uses: Counter[str] = Counter()
        self._branches: dict[Any, set[str]] = defaultdict(set)

    def expect(self, plans: Iterable[tuple[Plan, Sequence[Step]]]) -> None:
        """Say which configurations are to come, before the first: what only one of them needs is not kept."""
        for plan, steps in plans:
            self._uses.update(step.key for step in steps)
            for step in steps:
                if step.calibrated:
                    self._branches[node(plan.stages[step.stage], step)].add(step.key)

    @contextmanager
    def quantized(self, plan: Plan, steps: Sequence[Step]) -> Iterator[list[LayerReport]]:
        """The model is quantized by `plan` for a while; gives the layers' reports."""
        with _restored(self.model, plan), torch.no_grad():
            self.model.eval()
            untie_heads(self.model, plan.layers)
            with without_cache(self.model), frozen(self.model):
                made = self._all_blocks(plan, steps)
            for block in made:
                _install(self.model, _rounded(block, self._stored))
            yield [report for block in made for report in block.reports]

    def _all_blocks(self, plan: Plan, steps: Sequence[Step]) -> list[Made]:
        found: list[Made] = []
        walk: Walk | None = None
        at: tuple[int, int] = (-1, 0)  # stage and block before which the walk stands
        for step in steps:
            made = self._shelf.get(step.key)
            if made is None:
                if step.calibrated:
                    walk = self._walk(plan, step, walk if at[0] == step.stage else None, at[1])
                    at = (step.stage, step.index)
                made = self._make(plan, step, walk if step.calibrated else None)
                if self._uses[step.key] > 1:
                    self._shelf.put(step.key, made, made.nbytes)
            else:
                _install(self.model, made)
            found.append(made)
        return found

    def _walk(self, plan: Plan, step: Step, walk: Walk | None, index: int) -> Walk:
        """A walk that stands before a step: the one that stands before another of its stage, a kept one, or new."""
        stage = plan.stages[step.stage]
        place = ("walk", node(stage, step))
        if walk is None or walk.end <= step.index:
            kept: Walk | None = self._shelf.get(place)
            if kept is not None:
                return kept.copy()
            walk = record(self.model, stage, self._calibration(), step.index)
        else:
            for passed in range(index, step.index):
                walk.advance(self.model, passed)
        if self._shared(plan, step):
            self._shelf.put(place, walk.copy(), walk.nbytes)
        return walk

    def _make(self, plan: Plan, step: Step, walk: Walk | None) -> Made:
        stage = plan.stages[step.stage]
        jobs = stage.jobs[step.index]
        hessians: Mapping[str, SharedHessian] = {}
        watched = tuple(job.name for job in jobs if job.method in CALIBRATED)
        if walk is not None:
            place = ("hessians", node(stage, step), watched)
            hessians = self._shelf.get(place) or walk.hessians(self.model, step.index, jobs)
            if self._shared(plan, step):
                distinct = {id(hessian): hessian for hessian in hessians.values()}
                self._shelf.put(place, hessians, sum(hessian.nbytes for hessian in distinct.values()))
        if any(job.method == "awq" for job in jobs):
            _own_parameters(self.model.get_submodule(step.block))
        reports = quantize_block(self.model, walk, step.index, jobs, self._settings, hessians)
        layers = {job.name: self.model.get_submodule(job.name) for job in jobs}
        folded = {report.folded_into for report in reports if report.folded_into} - layers.keys()
        parameters = {
            f"{name}.{own}": parameter
            for name in sorted(folded)
            for own, parameter in self.model.get_submodule(name).named_parameters(recurse=False)
        }
        return Made(layers, parameters, tuple(reports))

    def _shared(self, plan: Plan, step: Step) -> bool:
        """Whether configurations part at this step."""
        return len(self._branches[node(plan.stages[step.stage], step)]) > 1

    def _calibration(self) -> list[Batch]:
        if self._batches is None:
            self._batches = list(self._make_batches())
        return self._batches


def _install(model: nn.Module, made: Made) -> None:
    for name, layer in made.layers.items():
        model.set_submodule(name, layer)
    for name, parameter in made.parameters.items():
        holder, _, own = name.rpartition(".")
        model.get_submodule(holder)._parameters[own] = parameter


def _own_parameters(block: nn.Module) -> None:
    """Copies in the place of a block's parameters: input scales are folded into them where they are."""
    for module in block.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and not isinstance(module, QuantLinear):
                module._parameters[own] = _parameter(parameter.detach().clone())


def _rounded(made: Made, stored: StoredDtype) -> Made:
    """As a checkpoint would give it back: what input scales were folded into, biases and kept scales are rounded."""

    def through(tensor: Tensor, name: str) -> Tensor:
        dtype = stored(name)
        return tensor if dtype is None else tensor.to(dtype)

    if not any(report.used == "awq" for report in made.reports):
        return made
    layers = {}
    for name, layer in made.layers.items():
        layers[name] = rounded = QuantLinear.__new__(QuantLinear)  # a copy would pack the weight again
        rounded.__dict__ = {**vars(layer), "_parameters": {**layer._parameters}, "_buffers": {**layer._buffers}}
        if layer.bias is not None:
            rounded._parameters["bias"] = _parameter(through(layer.bias, f"{name}.weight").to(layer.bias.dtype))
        if layer.weight_input_scale is not None:
            rounded._buffers["weight_input_scale"] = through(layer.weight_input_scale, f"{name}.weight")
    parameters = {
        name: _parameter(through(parameter, name).to(parameter.dtype)) for name, parameter in made.parameters.items()
    }
    return Made(layers, parameters, made.reports)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@contextmanager
def _restored(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Afterwards all modules and parameters of the model are those it had, and what its config says of ties."""
    linears = {name: model.get_submodule(name) for name in plan.layers}
    parameters = {module: dict(module._parameters) for module in model.modules()}
    configs: list[Any] = [config for config in _configs(model) if hasattr(config, "tie_word_embeddings")]
    ties = [config.tie_word_embeddings for config in configs]
    try:
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
        for module, own in parameters.items():
            module._parameters = own
        for config, tied in zip(configs, ties, strict=True):
            config.tie_word_embeddings = tied


def _configs(model: nn.Module) -> list[Any]:
    found = []
    for module in model.modules():
        config = getattr(module, "config", None)
        found += [each for each in (config, getattr(config, "text_config", None)) if each is not None]
    return list({id(config): config for config in found}.values())
