"""What allocations cost, in the budget's own terms: bits of all weights, bytes, or milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from mmq_kernels.eval import model_size
from mmq_kernels.quantize import GptqSettings
from mmq_kernels.sweep.allocation.budget import Budget, BudgetError
from mmq_kernels.sweep.allocation.latency import Latency
from mmq_kernels.sweep.allocation.sensitivity import Table
from mmq_kernels.sweep.allocation.solver import SLACK, Allocation
from mmq_kernels.sweep.allocation.subject import Subject
from mmq_kernels.sweep.allocation.units import Choice, Unit, named, packed_bits

Rows = list[list[float]]


class Costs(Protocol):
    """Of the choices of every unit, and of whole models.

    Attributes:
        limit: that the sum of the units' costs must not exceed.
        name: of what is measured on whole models.
    """

    limit: float
    name: str

    def table(self, measured: Table) -> Rows:
        """For each unit a row of its choices' costs."""

    def check(self, costs: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]) -> None:
        """Raises BudgetError where no allocation is within the limit, naming the least that one costs."""

    def of_model(self, chosen: Allocation, facts: dict[str, Any]) -> float:
        """Of a whole quantized model, in bits a weight, bytes or milliseconds."""

    def excess(self, cost: float) -> float:
        """By how much a whole model's cost is above the budget, in the units of the table; at most 0 inside."""

    def more(self, model: nn.Module) -> dict[str, Any]:
        """What else is to be measured on a whole quantized model."""

    def told(self) -> dict[str, Any]:
        """For the report."""


def least(costs: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]) -> float:
    """The least sum that any allocation has whose units agree within groups."""
    return float(sum(np.sum([costs[unit] for unit in group], axis=0).min() for group in groups))


class WeightCosts:
    """Bits of weights, as `mmq_kernels.eval.model_size` counts them.

    Codes, padding, scales and zero points of what is quantized; everything else with the subject's `float_bits`. A
    budget in bytes counts tables of positions and other buffers too.

    Args:
        model: the float model.
    """

    name = "weights"

    def __init__(
        self, subject: Subject, model: nn.Module, units: Sequence[Unit], choices: Sequence[Choice], budget: Budget
    ) -> None:
        self._subject, self._units, self._choices, self._budget = subject, units, choices, budget
        counted, held = subject.size(model), model_size(model)
        self.weights = counted.weights
        self.fixed = counted.weight_bits - sum(unit.weights for unit in units) * subject.float_bits
        """Bits of what no unit holds: embeddings, norms, biases, heads."""
        self.others = held.memory_bytes - held.weight_bits // 8
        """Bytes of what is no weight."""
        whole = budget.value * self.weights if budget.kind == "bpw" else 8 * (budget.value - self.others)
        self.limit = whole - self.fixed
        self._smallest: float | None = None

    def expect(self, model: nn.Module, method: str, settings: GptqSettings, groups: Sequence[Sequence[int]]) -> None:
        """`check`, before anything is measured.

        Raises:
            BudgetError: see there.
        """
        bits = self._subject.float_bits
        self.check(
            [
                [packed_bits(model, unit, choice, method, settings, bits) for choice in self._choices]
                for unit in self._units
            ],
            groups,
        )

    def table(self, measured: Table) -> Rows:
        return [
            [unit.weights * self._subject.float_bits if one is None else one.bits for one in row]
            for unit, row in zip(self._units, measured, strict=True)
        ]

    def check(self, costs: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]) -> None:
        self._smallest = least(costs, groups)
        if self._smallest > self.limit * (1 + SLACK):
            shown, float_bits = self._budget.shown, self._subject.float_bits
            halved = "; --dtype fp16 or bf16 counts half of that" if float_bits == 32 else ""
            whole, rest = self._cost(self._smallest + self.fixed), self._cost(self.fixed)
            raise BudgetError(
                f"budget {self._budget} cannot be met: {named(self._choices[0])} everywhere takes {shown(whole)}, of "
                f"which {shown(rest)} is what no bits are allocated to (embeddings, norms, biases, heads, components "
                f"left out) at {float_bits} bits a weight{halved}"
            )

    def _cost(self, bits: float) -> float:
        return bits / self.weights if self._budget.kind == "bpw" else bits / 8 + self.others

    def of_model(self, chosen: Allocation, facts: dict[str, Any]) -> float:
        return self._cost(facts["bits"])

    def excess(self, cost: float) -> float:
        over = cost - self._budget.value * (1 + SLACK)
        return over * (self.weights if self._budget.kind == "bpw" else 8)

    def more(self, model: nn.Module) -> dict[str, Any]:
        held = model_size(model)
        return {"bpw": self._subject.size(model).bpw, "bpw_held": held.bpw, "memory_bytes": held.memory_bytes}

    def told(self) -> dict[str, Any]:
        return {
            "asked": str(self._budget),
            "kind": self._budget.kind,
            "value": self._budget.value,
            "smallest": None if self._smallest is None else self._cost(self._smallest + self.fixed),
            "not_allocated": self._cost(self.fixed),
            "float_bits": self._subject.float_bits,
            "weights": self.weights,
        }


class TimeCosts:
    """Milliseconds on this machine, rounded up to microseconds; see `latency`."""

    name = "time"

    def __init__(self, latency: Latency, units: Sequence[Unit], choices: Sequence[Choice], budget: Budget) -> None:
        self._latency, self._budget = latency, budget
        self._rows = [[math.ceil(latency.unit(unit, choice) * 1e3) / 1e3 for choice in choices] for unit in units]
        self.limit = budget.value - latency.rest
        self._smallest: float | None = None

    def table(self, measured: Table) -> Rows:
        return self._rows

    def check(self, costs: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]) -> None:
        self._smallest = least(costs, groups)
        if self._smallest > self.limit * (1 + SLACK) or self.limit <= 0:
            shown, rest = self._budget.shown, self._latency.rest
            raise BudgetError(
                f"budget {self._budget} cannot be met: the fastest of these widths take {shown(self._smallest + rest)} "
                f"for {self._latency.what}, of which {shown(rest)} is spent beside the linears"
            )

    def of_model(self, chosen: Allocation, facts: dict[str, Any]) -> float:
        return self._latency.rest + sum(row[index] for row, index in zip(self._rows, chosen, strict=True))

    def excess(self, cost: float) -> float:
        return cost - self._budget.value * (1 + SLACK)

    def more(self, model: nn.Module) -> dict[str, Any]:
        held = model_size(model)
        return {"bpw_held": held.bpw, "memory_bytes": held.memory_bytes} | self._latency.measured(model)

    def told(self) -> dict[str, Any]:
        return {
            "asked": str(self._budget),
            "kind": "ms",
            "value": self._budget.value,
            "smallest": None if self._smallest is None else self._smallest + self._latency.rest,
            "not_allocated": self._latency.rest,
            "of": self._latency.what,
        }
