"""What a report says, in order, whatever it is written in: paragraphs, tables, plots, commands and examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import plotly.graph_objects as go

from mmq_kernels.page import Column, Table
from mmq_kernels.page.parts import Cell
from mmq_kernels.sweep import fronts, words
from mmq_kernels.sweep.analysis import Analysis, place
from mmq_kernels.sweep.findings import Findings
from mmq_kernels.sweep.matched import Comparison
from mmq_kernels.sweep.predictions import Predictions
from mmq_kernels.sweep.report import figures
from mmq_kernels.sweep.report.samples import Example, examples
from mmq_kernels.sweep.store import Result

MOST_ROWS = 1_500
"""Of the table of results."""
MOST_SETTINGS = 500
"""Of the table of matched settings."""
MOST_SCENES = 6
"""3-D plots of a page: a browser draws so many at once without dropping any."""


@dataclass(frozen=True)
class Note:
    """A remark in small letters."""

    text: str


@dataclass(frozen=True)
class ToCopy:
    """A command, with what it is for."""

    about: str
    command: str


Block: TypeAlias = str | Note | list[str] | Table | go.Figure | ToCopy | Example
"""A paragraph, a remark, a list of sentences, a table, a plot, a command, or an example."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; `level` is 2 or 3."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 2


def contents(found: Findings, predictions: Callable[[str], Path] | None) -> list[Section]:
    """The sections of a report.

    Args:
        found: of a database.
        predictions: where the per-sample predictions of a fingerprint are; None for nowhere.
    """
    reader = Predictions(predictions)
    subjects = sorted({_kind(each) for each in found.analyses})
    sections = [_summary(found)]
    scenes = [MOST_SCENES]
    for model, task, metric, factors in subjects:
        analyses = [each for each in found.analyses if _kind(each) == (model, task, metric, factors)]
        results = [
            result
            for result in found.results
            if (result.model, result.task, tuple(sorted(result.factors))) == (model, task, factors)
            and metric in result.metrics
        ]
        sections += _subject(analyses, results, scenes)
        known = {result.fingerprint for result in results}
        if comparisons := [each for each in found.comparisons if each.settings[0].one in known]:
            sections.append(_methods(comparisons))
        said, problems = examples(results, analyses, reader)
        if said:
            sections.append(_examples(said))
        sections += [Section("Examples that could not be read", [problems], 3)] if problems else []
    if found.left_out:
        sections.append(Section("Left out", [found.left_out]))
    return sections


def _kind(found: Analysis) -> tuple[str, str, str, tuple[str, ...]]:
    """What is drawn together: a model and task, a metric, and the same factors."""
    return found.model, found.task, found.metric, tuple(sorted((*found.consensus, *found.constant)))


def _title(found: Analysis) -> str:
    """What is analyzed, and whether single thirds of the blocks were varied."""
    thirds = any("." in name for name in (*found.consensus, *found.constant))
    return f"{words.short_model(found.model)}, {found.task}{', by thirds of the blocks' if thirds else ''}"


def _summary(found: Findings) -> Section:
    blocks: list[Block] = []
    for model, task in sorted({(each.model, each.task) for each in found.analyses}):
        analyses = [each for each in found.analyses if (each.model, each.task) == (model, task)]
        compared = [each for each in found.comparisons if (each.model, each.task) == (model, task)]
        sentences = [words.importance_sentence(each) for each in analyses]
        sentences += [words.keeping_sentence(each) for each in analyses]
        sentences += [words.comparison_sentence(each) for each in compared]
        blocks += [f"{model}, {task}:", sentences]
    return Section("Summary", blocks)


def _subject(analyses: Sequence[Analysis], results: Sequence[Result], scenes: list[int]) -> list[Section]:
    first = analyses[0]
    title = _title(first)
    plots = [figures.against_cost(analyses, results, first.metric), figures.alone(analyses, first.metric)]
    worth = Section(title, [plot for plot in plots if plot is not None])
    if any(len(_of(each, results)) > figures.MOST_POINTS for each in analyses):
        worth.blocks.append(Note(f"Of each method {figures.MOST_POINTS:,} configurations are drawn, and every front."))
    recipes = Section("What keeps the score, to copy", _recipes(analyses, results), 3)
    matters = Section(
        "Which part matters",
        [
            figures.importance(analyses),
            Note(
                "Bars are the mean of random forest, permutation and Shapley values; the lines on them reach from the "
                "least to the most that any measure gives."
            ),
            *(_importance(each) for each in analyses),
            *(Note(f"{words.method_name(each.method)} without {measure}: {reason}.")
              for each in analyses for measure, reason in each.left_out.items()),
        ],
        3,
    )  # fmt: skip
    together = Section("Parts together", [plot for each in analyses if (plot := figures.heatmaps(each))], 3)
    for plot in (figures.landscape(analyses), figures.space(analyses, results, first.metric)):
        if plot is not None and scenes[0] > 0:
            scenes[0] -= 1
            together.blocks.append(plot)
        elif plot is not None:
            together.blocks.append(Note("A 3-D plot is left out here: browsers draw only a few on one page."))
    tested = Section("Against 16 bits", [table for each in analyses if (table := _differences(each, results))], 3)
    return [each for each in (worth, recipes, matters, together, tested, _results(results, analyses)) if each.blocks]


def _of(found: Analysis, results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.method == found.method]


def _recipes(analyses: Sequence[Analysis], results: Sequence[Result]) -> list[Block]:
    data = {result.fingerprint: result.data for result in results}
    blocks: list[Block] = []
    for each in analyses:
        method = words.method_name(each.method)
        rows: list[list[Cell]] = []
        made: dict[str, ToCopy] = {}
        for share, point in each.keeps.items():
            rows.append([
                f"{share:.0%}",
                None if point is None else point.cost / words.COST_UNITS[each.cost or "bpw"],
                None if point is None else point.value,
                "nothing that was measured" if point is None else words.configuration(point.factors),
            ])  # fmt: skip
            if point is not None and (text := words.command(point, each.model, each.task, data[point.fingerprint])):
                about = f"{method}, keeps {share:.0%}: {words.configuration(point.factors)}"
                made[text] = ToCopy(about, text)
        if rows:
            whole = f"of {each.whole:.4g}{'' if each.measured_whole else ', the best there is,'}"
            columns = [
                Column("keeps"),
                Column(words.COST_NAMES[each.cost or "bpw"], ".3f"),
                Column(words.metric_name(each.metric), ".4f"),
                Column("configuration"),
            ]
            blocks.append(
                Table(f"{words.method_name(each.method)}: the least that keeps a share {whole}.", columns, rows)
            )
        blocks += made.values()
    return blocks


def _importance(found: Analysis) -> Table:
    measures = list(found.importance)
    shares = found.decomposition
    rows: list[list[Cell]] = [
        [part, share, *(found.importance[measure][part] for measure in measures), shares.get(part)]
        for part, share in found.consensus.items()
    ]
    rows += [
        [term, None, *(None for _ in measures), share] for term, share in shares.items() if term not in found.consensus
    ]
    agreement = min(found.agreement.values(), default=None)
    caption = (
        f"{words.method_name(found.method)}: shares by measure, and what part of the variance each term explains"
        f"{'' if found.full else ' (fitted: not every combination was measured)'}. The forest predicts unseen "
        f"configurations with R² = {found.r2:.3f}"
        + ("." if agreement is None else f"; the measures' ranks agree to at least {agreement:.2f} (Spearman).")
    )
    columns = [Column("part"), Column("importance", ".3f"), *(Column(measure, ".3f") for measure in measures)]
    return Table(caption, [*columns, Column("share of variance", ".3f")], rows)


def _differences(found: Analysis, results: Sequence[Result]) -> Table | None:
    if not found.differences:
        return None
    known = {result.fingerprint: result for result in results}
    tested = sum(each.p is not None for each in found.differences)
    name = words.metric_name(found.metric)
    columns = [Column("configuration"), Column(f"{name} - that of 16 bits", "+.4f")]
    rows: list[list[Cell]] = [[words.configuration(known[each.one].factors), each.value] for each in found.differences]
    said = "None is tested: neither predictions nor intervals were kept."
    if tested:
        said = f"95% intervals; p is corrected for {tested} comparisons (Holm)."
        columns += [Column("from", "+.4f"), Column("to", "+.4f"), Column("p", ".3g"), Column("differs"), Column("by")]
        for row, each in zip(rows, found.differences, strict=True):
            real = {True: "yes", False: "not shown", None: "not tested"}[each.real]
            row += [each.low, each.high, each.adjusted, real, each.how if each.p is not None else ""]
    about = f"{words.method_name(found.method)} against everything at 16 bits"
    return Table(f"{about}: one low part, and what keeps a share of the score. {said}", columns, rows)


def _methods(comparisons: Sequence[Comparison]) -> Section:
    blocks: list[Block] = [[words.comparison_sentence(each) for each in comparisons]]
    for each in comparisons:
        blocks.append(figures.gaps(each))
        chosen = sorted(each.settings, key=lambda setting: -abs(setting.difference))[:MOST_SETTINGS]
        caption = f"{words.method_name(each.one)} and {words.method_name(each.other)} at the same settings"
        if len(chosen) < len(each.settings):
            caption += f": the {len(chosen)} of {len(each.settings):,} that differ most"
        columns = [
            Column("configuration"),
            *(Column(words.method_name(method), ".4f") for method in (each.one, each.other)),
            Column("difference", "+.4f"),
        ]
        blocks.append(
            Table(
                f"{caption}.",
                columns,
                [[words.configuration(own.factors), *own.values, own.difference] for own in chosen],
            )
        )
    return Section("Methods at the same settings", blocks, 3)


def _results(results: Sequence[Result], analyses: Sequence[Analysis]) -> Section:
    """Every result, or of very many those on a front, those of one low part, and others drawn at random."""
    first = {point.fingerprint for each in analyses for point in (*each.front, *each.keeps.values()) if point}
    first |= {result.fingerprint for result in results if fronts.lowered(result) <= 1}
    chosen = [result for result in results if result.fingerprint in first][:MOST_ROWS]
    others = [result for result in results if result.fingerprint not in first]
    chosen += figures.thinned(others, MOST_ROWS - len(chosen))
    caption = f"All {len(results):,} configurations."
    if len(chosen) < len(results):
        caption = (
            f"{len(chosen):,} of {len(results):,} configurations: those on a front or with one low part, and others "
            "drawn at random; `mmq report --format csv` writes all."
        )
    factors = sorted((*analyses[0].consensus, *analyses[0].constant), key=place)
    chosen.sort(key=lambda result: (_cost(result), result.method))
    metrics = sorted({name for result in results for name in result.metrics}, key=_metric_order)
    costs = [cost for cost in fronts.COSTS if any(getattr(result, cost) is not None for result in results)]
    columns = [
        Column("method"),
        *(Column(name, "" if any(isinstance(r.factors[name], str) for r in results) else "g") for name in factors),
        *(Column(words.COST_NAMES[cost], ".3f") for cost in costs),
        *(Column(words.metric_name(name), ".4f") for name in metrics),
    ]
    rows: list[list[Cell]] = [
        [
            words.method_name(result.method),
            *(result.factors[name] for name in factors),
            *(None if (spent := getattr(result, cost)) is None else spent / words.COST_UNITS[cost] for cost in costs),
            *(result.metrics.get(name) for name in metrics),
        ]
        for result in chosen
    ]
    return Section("Every configuration", [Table(caption, columns, rows)], 3)


def _metric_order(name: str) -> list[int | str]:
    """R@10 behind R@5."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _cost(result: Result) -> float:
    return next((float(spent) for cost in fronts.COSTS if (spent := getattr(result, cost)) is not None), 0.0)


def _examples(said: Sequence[Example]) -> Section:
    remark = Note(
        "Half of them are those on which the configurations differ most, of the first "
        "few thousand samples; the others are the first ones."
    )
    return Section("What each configuration said", [remark, *said], 3)
