"""`allocate`: a model, a budget and a task in; bits for every block out, as a recipe, with what was measured.

Four stages: what quantizing each unit alone does (`sensitivity`); the optimum under the budget by several readings of
that (`solver`, `search`); the proposals quantized and scored beside every uniform allocation within the budget; of the
best few the task's own metrics. Every measurement is kept as it is made, so that a killed run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmq_kernels.checkpoint import check_target, quantize_checkpoint
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.eval.result import versions
from mmq_kernels.models import quantize_model
from mmq_kernels.quantize import GptqSettings, Recipe
from mmq_kernels.quantize.recipe import METHODS
from mmq_kernels.spec import PER_CHANNEL
from mmq_kernels.sweep.allocation.budget import Budget, BudgetError
from mmq_kernels.sweep.allocation.costs import Costs, TimeCosts, WeightCosts
from mmq_kernels.sweep.allocation.finals import Final, finals, told, winner, within_noise
from mmq_kernels.sweep.allocation.latency import Latency, Timer, check_tokens
from mmq_kernels.sweep.allocation.measurements import Measurements
from mmq_kernels.sweep.allocation.output import Output
from mmq_kernels.sweep.allocation.scoring import METRICS, Probe, Scorer, task_data
from mmq_kernels.sweep.allocation.search import Candidate, Measured, Search, error_models, run
from mmq_kernels.sweep.allocation.sensitivity import Table, measure_alone
from mmq_kernels.sweep.allocation.subject import Subject
from mmq_kernels.sweep.allocation.units import choices_of, grouped, named, recipe_of, units_of
from mmq_kernels.sweep.identity import code_version, model_digest

GROUPS = (32, 64, PER_CHANNEL)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class AllocationOptions:
    """How bits are allocated.

    Attributes:
        method: of all layers that are quantized: uniform, rtn, gptq, gptq+ or awq.
        bits: widths to choose from; 16 leaves a unit alone.
        groups: group sizes to choose from, -1 for a whole row; None for 32, 64 and -1 (uniform: -1).
        symmetric: of all layers.
        per: what gets a width of its own: component, block, or kind (attention and MLP of a block).
        components: that bits are allocated to, the others being left alone; all where none is named.
        settings: of GPTQ.
        probe_bits: widths at which each unit alone is measured on the whole model; at others that is inferred.
        probe: samples for that.
        selection: samples that whole models are scored on; None for all that are left, at most 1024.
        evaluations: models that are quantized and scored beside the uniform ones.
        tokens: of a budget in milliseconds; see `latency`.
        dtype: fp32, fp16 or bf16, of what is left alone; None as stored.
        batch_size: samples a forward pass.
        seed: of the draw of samples.
    """

    method: str = "gptq"
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 16)
    groups: tuple[int, ...] | None = None
    symmetric: bool = False
    per: str = "block"
    components: tuple[str, ...] = ()
    settings: GptqSettings = field(default_factory=GptqSettings)
    probe_bits: tuple[int, ...] = (2, 3, 4)
    probe: int = 128
    selection: int | None = None
    evaluations: int = 24
    tokens: int | None = None
    dtype: str | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.groups is None:
            object.__setattr__(self, "groups", (PER_CHANNEL,) if self.method == "uniform" else GROUPS)
        assert self.groups is not None
        if self.method == "uniform" and set(self.groups) != {PER_CHANNEL}:
            raise ValueError(f"group of method uniform must be -1 (one scale a tensor), got {list(self.groups)}")
        for name in ("probe", "evaluations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        choices_of(self.bits, self.groups, self.symmetric)


def allocate(
    source: str | Path,
    budget: Budget | str,
    task: str,
    data: str | Path,
    out: str | Path,
    *,
    calibration: CalibrationSource,
    options: AllocationOptions = AllocationOptions(),
    device: torch.device | str = "cpu",
    timer: Timer | None = None,
    checkpoint: str | Path | None = None,
    measurements: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the bits of every unit of a model that serve a task best within a budget.

    Args:
        source: folder or hub name of the unquantized model, which has to fit in memory.
        budget: such as "4.0bpw", "2GB" or "30ms".
        task, data: what the model is for, and the folder of its data set, with a training split.
        out: folder for ``recipe.yaml``, ``allocation.json`` and ``measurements.jsonl``; a killed run goes on there.
        calibration: of the method, and of the blocks' output errors.
        timer: takes the times that a budget in milliseconds needs (`mmq_kernels.bench.timing.timed`).
        checkpoint: a folder to write the quantized model to.
        measurements: a file instead of the one in `out`, to share between budgets.
        progress: told (done, in all, what).

    Returns:
        What ``allocation.json`` holds.

    Raises:
        BudgetError: for a budget that no allocation meets; it names the smallest that one does.
        ValueError, CheckpointError, DataError, ModelMismatch: for other bad input, before anything is measured.
    """
    started = time.perf_counter()
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    if budget.kind == "ms" and timer is None:
        raise ValueError(f"a budget in milliseconds ({budget}) needs a timer, got none")
    if checkpoint is not None:
        check_target(checkpoint)
    subject = Subject.of(source, device, options.dtype)
    made = _Allocator(subject, budget, task, data, out, calibration, options, timer, measurements)
    report = made.report(progress)
    recipe = Recipe.parse(report["recipe"])
    if checkpoint is not None:
        facts = quantize_checkpoint(
            subject.folder,
            recipe,
            checkpoint,
            calibration=calibration,
            settings=options.settings,
            resume=True,
            device=device,
            progress=progress,
        )
        report |= {"checkpoint": str(checkpoint), "disk_bytes": facts["disk_bytes"]}
    report["seconds"] = round(time.perf_counter() - started, 2)
    made.output.write(report, recipe)
    return report | {"out": str(out)}


class _Allocator:
    """One allocation: everything that its stages share. Made, it has checked all input and measured nothing."""

    def __init__(
        self,
        subject: Subject,
        budget: Budget,
        task: str,
        data: str | Path,
        out: str | Path,
        calibration: CalibrationSource,
        options: AllocationOptions,
        timer: Timer | None,
        measurements: str | Path | None,
    ) -> None:
        self.subject, self.budget, self.options, self.timer = subject, budget, options, timer
        self.choices = choices_of(options.bits, options.groups or (), options.symmetric)
        processor, model = subject.processor(), subject.load()
        self.model: Any = model
        self.units = units_of(model, options.per, options.components)
        self.groups = grouped(self.units, options.per)
        self.costs: Costs
        if budget.kind == "ms":
            check_tokens(options.tokens, self.units)
        else:
            self.costs = WeightCosts(subject, model, self.units, self.choices, budget)
            self.costs.expect(model, options.method, options.settings, self.groups)
        self.data = task_data(
            task, data, processor, calibration=calibration, count=options.selection, seed=options.seed
        )
        self.batches = calibration.batches(model, processor)
        self.probe = Probe(model, self.data.first(options.probe))
        self.scorer = Scorer(model, self.data, options.batch_size)
        about = {
            "model": model_digest(subject.folder),
            "device": str(subject.device),
            "dtype": str(subject.dtype),
            "method": options.method,
            "settings": str(options.settings),
            "calibration": calibration.fingerprint(),
            "task": task,
            "probe": self.probe.data.names(),
            "code": code_version(),
            "torch": torch.__version__,
        }
        self.calibration_samples = sum(each.samples for each in calibration.data)
        self.selection = {"samples": self.data.names()}
        self.output = Output(out, {**about, **self.selection, "budget": str(budget), "options": str(asdict(options))})
        self.kept = Measurements(Path(measurements) if measurements else self.output.measurements, about)

    def report(self, progress: Progress | None) -> dict[str, Any]:
        """All stages."""
        options, names = self.options, [named(choice) for choice in self.choices]
        table = self._alone(progress)
        if self.budget.kind == "ms":
            assert self.timer is not None
            latency = Latency(self.model, self.units, self.data.first(1).batches(self.model)[0],
                              tokens=options.tokens, timer=self.timer, kept=self.kept)  # fmt: skip
            self.costs = TimeCosts(latency, self.units, self.choices, self.budget)
        self.model = None  # candidates are loaded one at a time
        costs = self.costs.table(table)
        self.costs.check(costs, self.groups)
        search = Search(error_models(table), costs, self.costs.limit, self.groups, self.scorer.float_loss)
        run(
            search,
            lambda candidate, predicted: self._score(search, candidate, predicted),
            names=names,
            components=[unit.component for unit in self.units],
            count=options.evaluations,
            progress=progress,
        )
        inside = [one for one in search.measured if one.inside]
        if not inside:
            raise BudgetError(
                f"budget {self.budget}: none of {len(search.measured)} quantized models turned out within it"
            )
        best = finals(inside, self.scorer, self._quantized, self.kept, self.selection, self.data.task)
        return self._told(search, winner(best, self.data.task), best, table)

    def _alone(self, progress: Progress | None) -> Table:
        return measure_alone(
            self.model,
            self.units,
            self.choices,
            self.batches,
            method=self.options.method,
            settings=self.options.settings,
            deviation=self.probe.deviation,
            at=[choice for choice in self.choices if choice and choice.bits in self.options.probe_bits],
            kept=self.kept,
            progress=progress,
        )

    def _recipe(self, candidate: Candidate) -> Recipe:
        return recipe_of(self.units, [self.choices[index] for index in candidate.chosen], self.options.method)

    def _quantized(self, candidate: Candidate) -> Any:
        model = self.subject.load()
        quantize_model(model, self._recipe(candidate), self.batches, settings=self.options.settings)
        return model

    def _score(self, search: Search, candidate: Candidate, predicted: float | None) -> Measured:
        """Quantizes, weighs and scores a candidate; one that is heavier than its parts lowers the search's limit."""

        def measure() -> dict[str, Any]:
            model = self._quantized(candidate)
            size = self.subject.size(model)
            return {"loss": self.scorer.loss(model), "bits": size.weight_bits} | self.costs.more(model)

        what = {"measured": "model", "recipe": str(self._recipe(candidate)), "selection": self.selection}
        facts = self.kept.once(measure, **what, counted=self.costs.name) | {"key": self.kept.key(**what)}
        cost = self.costs.of_model(candidate.chosen, facts)
        excess = self.costs.excess(cost)
        if excess > 0:
            search.limit -= excess
        return Measured(candidate, predicted, facts["loss"], cost, excess <= 0, facts)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _told(self, search: Search, best: Final, final: list[Final], table: Table) -> dict[str, Any]:
        chosen, options = best.measured, self.options
        uniform = min(
            (one for one in search.measured if one.candidate.uniform and one.inside),
            key=lambda one: one.loss,
            default=None,
        )
        metrics = {one.measured.chosen: one.to_json() for one in final}
        rival = next((one for one in final if uniform is not None and one.measured.chosen == uniform.chosen), None)
        lead = {} if rival is None or rival is best else best.against(rival, ("nll", *METRICS[self.data.task]))
        notes = self._notes(search, chosen)
        if uniform is not None and within_noise(lead):
            notes.append(
                f"on {len(self.data.samples)} samples the choice is not told apart from the best uniform allocation, "
                f"{self._recipe(uniform.candidate)}: {told(lead)}. The loss of that one is {uniform.loss:.4f}, the "
                f"float model's {search.float_loss:.4f}: no more than the difference is there to win"
            )
        names = [named(choice) for choice in self.choices]
        return {
            "model": str(self.subject.folder),
            "task": self.data.task,
            "data": str(self.data.base.folder),
            "budget": self.costs.told(),
            "method": options.method,
            "per": options.per,
            "recipe": str(self._recipe(chosen.candidate)),
            "bits": {unit.name: names[index] for unit, index in zip(self.units, chosen.chosen, strict=True)},
            "cost": self._told_model(chosen) | metrics.get(chosen.chosen, {}),
            "float": {"loss": search.float_loss},
            "uniform": None if uniform is None else self._told_model(uniform) | metrics.get(uniform.chosen, {}),
            "loss": self.scorer.loss_name,
            "lead": {name: asdict(ends) for name, ends in lead.items()},
            "notes": notes,
            "samples": {
                "calibration": self.calibration_samples,
                "probe": len(self.probe.data.samples),
                "selection": len(self.data.samples),
            },
            "shortlist": [
                self._told_model(one) | metrics.get(one.chosen, {})
                for one in sorted(search.measured, key=lambda one: one.loss)
            ],
            "sensitivities": [
                {
                    "unit": unit.name,
                    "component": unit.component,
                    "weights": unit.weights,
                    "choices": {name: one.to_json() for name, one in zip(names, row, strict=True) if one},
                }
                for unit, row in zip(self.units, table, strict=True)
            ],
            "additivity": search.additivity(),
            "measured_now": self.kept.fresh,
            "versions": versions(),
        }

    def _told_model(self, one: Measured) -> dict[str, Any]:
        bits = one.facts["bits"]
        return {
            "why": one.candidate.why,
            "recipe": str(self._recipe(one.candidate)),
            "loss": one.loss,
            "predicted_loss": one.predicted,
            "cost": one.cost,
            "inside": one.inside,
            "weight_bytes": bits / 8,
            **{name: value for name, value in one.facts.items() if name not in ("loss", "bits", "key")},
        }

    def _notes(self, search: Search, chosen: Measured) -> list[str]:
        notes = []
        if self.scorer.loss_name != "nll":
            why = self.scorer.why_not or f"task {self.data.task} has no likelihood"
            notes.append(f"{why}: models were ranked by how far their outputs are from the float model's")
        uniform = [one for one in search.measured if one.candidate.uniform]
        if not uniform:
            notes.append("no uniform allocation is within the budget")
        elif chosen.candidate.uniform:
            others = len(search.measured) - len(uniform)
            notes.append(f"a uniform allocation won: none of {others} mixed ones within the budget did better here")
        return notes
