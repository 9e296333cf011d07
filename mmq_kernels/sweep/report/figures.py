"""The plots of a report: what a score costs, each part alone, importance, pairs of parts, two methods."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mmq_kernels.page import plain
from mmq_kernels.quantize.recipe import COMPONENTS
from mmq_kernels.sweep import fronts, words
from mmq_kernels.sweep.analysis import Analysis
from mmq_kernels.sweep.curves import Level, Surface
from mmq_kernels.sweep.matched import Comparison
from mmq_kernels.sweep.store import Result

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Told apart with any colour vision (Okabe and Ito 2008, and two more); the same in page.js."""
Axis = dict[str, Any]
"""Attributes of an axis by their dotted names."""
DASHES = ("solid", "dash", "dot", "dashdot")
SCALE = "Viridis"
MOST_POINTS = 1_500
"""Of a trace; of more a seeded sample, beside the whole front."""
MOST_HEATMAPS = 3


def colour(method: str, methods: Sequence[str]) -> str:
    return COLOURS[list(methods).index(method) % len(COLOURS)]


def thinned(results: Sequence[Result], most: int, seed: int = 0) -> list[Result]:
    """At most so many, drawn at random, in their order."""
    if len(results) <= most:
        return list(results)
    return [results[i] for i in sorted(np.random.default_rng(seed).permutation(len(results))[:most])]


def against_cost(analyses: Sequence[Analysis], results: Sequence[Result], metric: str) -> go.Figure | None:
    """Every configuration's score against what it costs, fronts as lines; a button for each cost that is known."""
    costs = [cost for cost in fronts.COSTS if any(cost in each.fronts for each in analyses)]
    if not costs:
        return None
    drawn, shown = go.Figure(), []
    methods = [each.method for each in analyses]
    for cost, each in itertools.product(costs, analyses):
        own = [result for result in results if result.method == each.method and getattr(result, cost) is not None]
        traces = _cost_traces(each, thinned(own, MOST_POINTS), metric, cost, colour(each.method, methods))
        for trace in traces if cost in each.fronts else ():
            trace.visible = cost == costs[0]
            drawn.add_trace(trace)
            shown.append(cost)
    drawn.update_layout(
        title=f"{words.metric_name(metric)} against size and speed: lines are Pareto fronts",
        xaxis_title=words.COST_NAMES[costs[0]],
        yaxis_title=plain(words.metric_name(metric)),
        height=480,
    )
    if len(costs) > 1:
        buttons = [
            {
                "label": words.COST_NAMES[cost],
                "method": "update",
                "args": [{"visible": [each == cost for each in shown]}, {"xaxis.title.text": words.COST_NAMES[cost]}],
            }
            for cost in costs
        ]
        drawn.update_layout(
            updatemenus=[
                {"type": "buttons", "direction": "right", "buttons": buttons, "x": 1, "xanchor": "right", "y": 1.15}
            ]
        )
    return drawn


def _cost_traces(found: Analysis, own: Sequence[Result], metric: str, cost: str, tone: str) -> list[go.Scatter]:
    unit = words.COST_UNITS[cost]
    name = plain(words.method_name(found.method))
    hover = f"%{{text}}<br>%{{x:.4g}} {words.COST_NAMES[cost]}, %{{y:.4g}}"
    return [
        go.Scatter(
            x=[getattr(result, cost) / unit for result in own],
            y=[result.metrics[metric] for result in own],
            text=[plain(words.configuration(result.factors)) for result in own],
            mode="markers",
            marker={"color": tone, "size": 6, "opacity": 0.4},
            name=name,
            legendgroup=name,
            hovertemplate=hover,
        ),
        go.Scatter(
            x=[point.cost / unit for point in found.fronts.get(cost, ())],
            y=[point.value for point in found.fronts.get(cost, ())],
            text=[plain(words.configuration(point.factors)) for point in found.fronts.get(cost, ())],
            mode="lines+markers",
            line={"color": tone, "width": 2, "shape": "hv" if fronts.sign(metric) > 0 else "vh"},
            marker={"color": tone, "size": 8},
            name=f"{name}: front",
            legendgroup=name,
            hovertemplate=hover,
        ),
    ]


def alone(analyses: Sequence[Analysis], metric: str) -> go.Figure | None:
    """A curve for each part that alone has few bits; methods by dash."""
    drawn = go.Figure()
    parts = list(dict.fromkeys(part for each in analyses for part in each.alone))
    levels = sorted({value for each in analyses for curve in each.alone.values() for value, _ in curve})
    for index, each in enumerate(analyses):
        for part, curve in each.alone.items():
            if len(curve) < 2:
                continue
            drawn.add_trace(
                go.Scatter(
                    x=[words.level(value) for value, _ in curve],
                    y=[score for _, score in curve],
                    mode="lines+markers",
                    line={
                        "color": COLOURS[parts.index(part) % len(COLOURS)],
                        "dash": DASHES[index % len(DASHES)],
                        "width": 2,
                    },
                    name=plain(f"{part}, {words.method_name(each.method)}"),
                    hovertemplate="%{x} bits: %{y:.4g}",
                )
            )
    if not drawn.data:
        return None
    drawn.update_layout(
        title="One part low, the rest at 16 bits",
        xaxis_title="bits of the part",
        yaxis_title=plain(words.metric_name(metric)),
        height=440,
    )
    drawn.update_xaxes(type="category", categoryorder="array", categoryarray=[words.level(value) for value in levels])
    return drawn


def importance(analyses: Sequence[Analysis]) -> go.Figure:
    """Consensus of each part as bars; the lines on them reach from the least to the most that a measure gives."""
    drawn = go.Figure()
    methods = [each.method for each in analyses]
    for each in analyses:
        parts = list(each.consensus)
        mean = np.array(list(each.consensus.values()))
        measured = np.array([[shares[part] for part in parts] for shares in each.importance.values()])
        drawn.add_trace(
            go.Bar(
                x=[plain(part) for part in parts],
                y=mean.tolist(),
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (measured.max(0) - mean).clip(0).tolist(),
                    "arrayminus": (mean - measured.min(0)).clip(0).tolist(),
                    "thickness": 1.2,
                    "color": "#8a8f98",
                },
                marker={"color": colour(each.method, methods)},
                name=plain(words.method_name(each.method)),
                hovertemplate="%{x}: %{y:.1%}",
            )
        )
    drawn.update_layout(
        title="Importance of each part", barmode="group", bargap=0.4, yaxis_tickformat=".0%", height=400
    )
    drawn.update_yaxes(rangemode="tozero")
    return drawn


def heatmaps(found: Analysis) -> go.Figure | None:
    """The score by the values of two parts, a map for each pair."""
    pairs = found.surfaces[:MOST_HEATMAPS]
    if not pairs:
        return None
    titles = [plain(f"{each.rows} (up) and {each.columns}") for each in pairs]
    drawn = make_subplots(1, len(pairs), subplot_titles=titles, horizontal_spacing=0.09)
    for index, each in enumerate(pairs, 1):
        drawn.add_trace(
            go.Heatmap(
                x=[plain(words.level(value)) for value in each.column_levels],
                y=[plain(words.level(value)) for value in each.row_levels],
                z=each.values,
                coloraxis="coloraxis",
                hovertemplate=f"{plain(each.rows)} %{{y}}, {plain(each.columns)} %{{x}}: %{{z:.4g}}<extra></extra>",
            ),
            1,
            index,
        )
    drawn.update_xaxes(type="category")
    drawn.update_yaxes(type="category")
    drawn.update_layout(
        title=f"{plain(words.method_name(found.method))}: two parts at a time, mean over the others",
        coloraxis={"colorscale": SCALE, "colorbar": {"title": plain(words.metric_name(found.metric)), "thickness": 14}},
        height=420,
        margin={"t": 84},
    )
    return drawn


def landscape(analyses: Sequence[Analysis]) -> go.Figure | None:
    """3-D: the score over the bits of the two parts that matter most, a surface for each method."""
    drawn = go.Figure()
    pairs = [(each, pair) for each in analyses if (pair := _pair(each)) is not None]
    for index, (each, pair) in enumerate(pairs):
        where = f"{plain(pair.columns)} %{{customdata[1]}}, {plain(pair.rows)} %{{customdata[0]}}"
        drawn.add_trace(
            go.Surface(
                x=list(range(len(pair.column_levels))),
                y=list(range(len(pair.row_levels))),
                customdata=[[[own, other] for other in pair.column_levels] for own in pair.row_levels],
                z=pair.values,
                colorscale=SCALE,
                showscale=index == 0,
                colorbar={"thickness": 14, "len": 0.7},
                name=plain(words.method_name(each.method)),
                visible=index == 0,
                contours_z={"show": True, "usecolormap": True, "width": 1},
                hovertemplate=f"{where}: %{{z:.4g}}",
            )
        )
    if not pairs:
        return None
    axes = [(_axis(pair.columns, pair.column_levels), _axis(pair.rows, pair.row_levels)) for _, pair in pairs]
    scenes = [{"x": x, "y": y, "z": {"title.text": plain(words.metric_name(pairs[0][0].metric))}} for x, y in axes]
    _switched(drawn, scenes, [each.method for each, _ in pairs])
    drawn.update_layout(title="The two parts that matter most, mean over the others")
    return drawn


def _pair(found: Analysis) -> Surface | None:
    """The first pair of numbers of which most was measured."""
    for each in found.surfaces:
        numbers = not any(isinstance(value, str) for value in (*each.row_levels, *each.column_levels))
        cells = [value for row in each.values for value in row]
        if numbers and sum(value is not None for value in cells) >= 0.75 * len(cells):
            return each
    return None


def _axis(name: str, levels: Sequence[Level]) -> Axis:
    """An axis of a scene on which the values stand at even distances, whatever they are."""
    return {
        "title.text": plain(name),
        "tickvals": list(range(len(levels))),
        "ticktext": [plain(words.level(value)) for value in levels],
    }


def space(analyses: Sequence[Analysis], results: Sequence[Result], metric: str) -> go.Figure | None:
    """3-D: every configuration at the bits of its three parts, coloured by its score."""
    drawn = go.Figure()
    scenes: list[dict[str, Axis]] = []
    methods: list[str] = []
    for each in analyses:
        own = [result for result in results if result.method == each.method and metric in result.metrics]
        if any(part not in result.factors for result in own for part in COMPONENTS) or not own:
            continue
        own = thinned(own, MOST_POINTS)
        drawn.add_trace(
            go.Scatter3d(
                **{
                    axis: [result.factors[part] for result in own] for axis, part in zip("xyz", COMPONENTS, strict=True)
                },
                mode="markers",
                marker={
                    "size": 4,
                    "color": [result.metrics[metric] for result in own],
                    "colorscale": SCALE,
                    "showscale": True,
                    "colorbar": {"title": plain(words.metric_name(metric)), "thickness": 14, "len": 0.7},
                },
                text=[f"{result.metrics[metric]:.4g}" for result in own],
                hovertemplate="vision %{x}, connector %{y}, language %{z}: %{text}",
                name=plain(words.method_name(each.method)),
                visible=not methods,
            )
        )
        scenes.append({axis: {"title.text": f"{part} bits"} for axis, part in zip("xyz", COMPONENTS, strict=True)})
        methods.append(each.method)
    if not methods:
        return None
    _switched(drawn, scenes, methods)
    drawn.update_layout(title="Every configuration by the bits of its parts")
    return drawn


def _switched(drawn: go.Figure, scenes: Sequence[dict[str, Axis]], methods: Sequence[str]) -> None:
    """One trace at a time in a scene, a button for each method; the axes are those of the trace."""
    named = [
        {f"scene.{axis}axis.{name}": value for axis, own in scene.items() for name, value in own.items()}
        for scene in scenes
    ]
    drawn.update_layout({name.replace(".", "_"): value for name, value in named[0].items()})
    drawn.update_layout(
        scene={"xaxis": {"autorange": "reversed"}, "yaxis": {"autorange": "reversed"}},
        height=560,
        margin={"l": 0, "r": 0, "b": 0, "t": 64},
        showlegend=False,
    )
    if len(methods) > 1:
        buttons = [
            {
                "label": plain(words.method_name(method)),
                "method": "update",
                "args": [{"visible": [other == index for other in range(len(methods))]}, axes],
            }
            for index, (method, axes) in enumerate(zip(methods, named, strict=True))
        ]
        drawn.update_layout(
            updatemenus=[
                {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02}
            ]
        )


def gaps(found: Comparison) -> go.Figure:
    """Matched settings: one method's score across, the other's up; on the line both are alike."""
    settings = found.settings
    if len(settings) > MOST_POINTS:
        chosen = sorted(np.random.default_rng(0).permutation(len(settings))[:MOST_POINTS])
        settings = [settings[i] for i in chosen]
    one, other = (plain(words.method_name(method)) for method in (found.one, found.other))
    values = [value for each in settings for value in each.values]
    ends = [min(values), max(values)]
    drawn = go.Figure(
        [
            go.Scatter(
                x=ends, y=ends, mode="lines", line={"dash": "dash", "color": "#888", "width": 1}, hoverinfo="skip"
            ),
            go.Scatter(
                x=[each.values[1] for each in settings],
                y=[each.values[0] for each in settings],
                text=[plain(words.configuration(each.factors)) for each in settings],
                mode="markers",
                marker={"size": 7, "opacity": 0.6, "color": COLOURS[0]},
                hovertemplate=f"%{{text}}<br>{one} %{{y:.4g}}, {other} %{{x:.4g}}<extra></extra>",
            ),
        ]
    )
    drawn.update_layout(
        title=f"{one} against {other}, {len(found.settings)} settings: above the line {one} scores more",
        xaxis_title=f"{other}: {plain(words.metric_name(found.metric))}",
        yaxis_title=f"{one}: {plain(words.metric_name(found.metric))}",
        showlegend=False,
        height=440,
    )
    return drawn
