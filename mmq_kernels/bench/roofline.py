"""Achieved TFLOP/s against operations per byte, under the limits that were measured in the same run: one HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from mmq_kernels.bench.gemm import operations
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import Limits

_MARGIN = 2.0
"""How far the limit lines go beyond the outermost points, as a factor."""


def last_run(rows: Sequence[Row]) -> list[Row]:
    """The gemm rows of the last run among `rows`: its measured limits are its own to the last digit.

    Raises:
        ValueError: where there is no gemm row.
    """
    found = [row for row in rows if row.get("bench") == "gemm" and "matmul_tflops" in row]
    if not found:
        raise ValueError(f"rows for a roofline must hold one of the suite gemm, got {len(rows)} without")
    return [row for row in found if limits_of(row) == limits_of(found[-1])]


def limits_of(row: Row) -> Limits:
    """What was measured in the run of a gemm row."""
    return Limits(row["read_gb_per_s"], row["matmul_tflops"])


def intensity(row: Row) -> float:
    """Operations per byte moved."""
    return operations(row["m"], row["n"], row["k"]) / row["bytes"]


def write_roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw the last run in `rows` to `path`, an HTML file that opens offline; written beside and renamed.

    Raises:
        ValueError: where there is no gemm row.
    """
    page = figure(last_run(rows)).to_html(full_html=True, include_plotlyjs=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)


def figure(rows: Sequence[Row]) -> go.Figure:
    """A trace for each width, and the two limits as one line."""
    limits = limits_of(rows[-1])
    drawn = go.Figure(_limit_line(rows, limits))
    for bits in sorted({row["bits"] for row in rows}):
        drawn.add_trace(_points([row for row in rows if row["bits"] == bits], f"{bits} bits"))
    drawn.update_layout(title=_title(rows[-1], limits), template="plotly_white", height=720)
    drawn.update_xaxes(type="log", title="operations per byte moved")
    drawn.update_yaxes(type="log", title="TFLOP/s")
    return drawn


def _limit_line(rows: Sequence[Row], limits: Limits) -> go.Scatter:
    """``min(bandwidth * x, rate)``: up to the ridge along the bandwidth, flat from there."""
    ridge = limits.tflops * 1e3 / limits.gb_per_s
    outer = [intensity(row) for row in rows] + [ridge]
    ends = (min(outer) / _MARGIN, ridge, max(outer) * _MARGIN)
    return go.Scatter(
        x=ends,
        y=[min(limits.gb_per_s * x / 1e3, limits.tflops) for x in ends],
        mode="lines",
        line={"color": "#444", "dash": "dash"},
        name=f"limit: {limits.gb_per_s:,.0f} GB/s, {limits.tflops:.3g} TFLOP/s",
        hoverinfo="name",
    )


def _points(rows: Sequence[Row], name: str) -> go.Scatter:
    return go.Scatter(
        x=[intensity(row) for row in rows],
        y=[row["tflops"] for row in rows],
        text=[_label(row) for row in rows],
        mode="markers",
        marker={"size": [7 + math.log2(row["m"]) for row in rows]},
        name=name,
        hovertemplate="%{text}<br>%{x:.3g} operations a byte, %{y:.3g} TFLOP/s",
    )


def _label(row: Row) -> str:
    ratio = row[f"x_torch_{row['dtype']}"]
    return (
        f"{row['shape']} ({row['n']} x {row['k']}), m {row['m']}, group {row['group']}<br>{row['us']:.1f} us, "
        f"{row['share_of_limit']:.0%} of the limit, {ratio:.2f} x torch {row['dtype']}<br>{row['kernel']}"
    )


def _title(row: Row, limits: Limits) -> str:
    machine = row.get("gpu") or row.get("cpu") or "this machine"
    return f"{machine}, {row['dtype']}, at {row.get('commit')}: larger points have more tokens"
