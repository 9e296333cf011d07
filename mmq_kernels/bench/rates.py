"""From rows of the gemm benchmark to the rates that `select` weighs kernels by (`mmq_kernels.backends.costs`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from statistics import median

from mmq_kernels.backends.costs import GPU, Costs, Rates
from mmq_kernels.bench.record import Row

FEW, MANY = 16, 1024
"""Tokens up to which moving bytes takes the time, and from which multiplying does."""


def measured(rows: Iterable[Row], gpu: str) -> Costs:
    """The entry of a GPU: its bandwidth, its matmul rate, and of each the share that each kernel reached.

    Args:
        rows: of `bench_gemm` with kernels timed beside each other; others, and those of other GPUs, are left out.

    Raises:
        ValueError: where no row is left.
    """
    mine = [row for row in rows if row["bench"] == "gemm" and row.get("gpu") == gpu and row["activation"] == "none"]
    if not mine:
        raise ValueError(f"rows must hold a gemm measured on {gpu!r}, got none")
    table = replace(
        GPU,
        measured_on=gpu,
        bandwidth=median(row["read_gb_per_s"] for row in mine) * 1e9,
        matmul=median(row["matmul_tflops"] for row in mine) * 1e12,
    )
    return replace(table, kernels={name: _rates(name, mine, table) for name in table.kernels})


def _rates(name: str, rows: list[Row], table: Costs) -> Rates:
    """Shares with which the table's formula gives the measured times back; the estimate where none was measured."""
    rates, key = table.kernels[name], f"{name}_us"

    def busy(row: Row) -> float:
        """Seconds without what starting kernels takes."""
        return max(row[key] / 1e6 - rates.launches * table.launch, 1e-9)

    def expanded(row: Row) -> float:
        return row["n"] * row["k"] * rates.expanded

    few = [row for row in rows if key in row and row["m"] <= FEW]
    if few:
        shares = [(row["bytes"] + expanded(row)) / busy(row) / table.bandwidth for row in few]
        rates = replace(rates, bandwidth=_share(shares))
    many = [row for row in rows if key in row and row["m"] >= MANY]
    if many:
        writing = rates.bandwidth * table.bandwidth
        shares = [
            2 * row["m"] * row["n"] * row["k"] / max(busy(row) - expanded(row) / writing, 1e-9) / table.matmul
            for row in many
        ]
        rates = replace(rates, matmul=_share(shares))
    return rates


def _share(found: list[float]) -> float:
    return min(1.0, round(median(found), 3))
