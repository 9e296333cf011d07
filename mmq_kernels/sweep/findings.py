"""What a whole database says: each model, task and method by itself, and the methods against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmq_kernels.sweep.analysis import Analysis, analyze
from mmq_kernels.sweep.matched import Comparison, compare_methods
from mmq_kernels.sweep.predictions import Predictions
from mmq_kernels.sweep.store import Result, Store

MAIN_METRICS = ("cider", "accuracy", "text_r1")
"""The first of them that a result has is what it is judged by."""

Group = tuple[str, str, str, tuple[str, ...]]
"""Model, task, method, and names of the factors."""


@dataclass(frozen=True)
class Findings:
    """Analyses of all groups of results that say something.

    Attributes:
        results: what was analyzed.
        analyses: one a model, task, method and set of factors.
        comparisons: one a pair of methods of a model and task.
        left_out: groups that say nothing, and prediction files that could not be read, with the reason.
    """

    results: list[Result]
    analyses: list[Analysis]
    comparisons: list[Comparison]
    left_out: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values that `json` can write; of the results only what was found."""
        return {
            "analyses": [each.to_json() for each in self.analyses],
            "comparisons": [{**asdict(each), "real": each.real, "better": each.better} for each in self.comparisons],
            "left_out": self.left_out,
        }


def chosen_results(
    store: Store, *, model: str | None = None, task: str | None = None, method: str | None = None
) -> list[Result]:
    """Results of a model, task or method (None: of any).

    Raises:
        ValueError: there are none; it says what there is.
    """
    results = store.results(model=model, task=task, method=method)
    if not results:
        there = "; ".join(f"{name}: {', '.join(store.values(name)) or 'none'}" for name in ("model", "task", "method"))
        raise ValueError(f"{store.path} holds no such results ({there})")
    return results


def main_metric(results: Iterable[Result]) -> str:
    """What results are judged by unless one says otherwise; `cider` where they have no metric at all."""
    there = sorted({name for result in results for name in result.metrics})
    return next((name for name in MAIN_METRICS if name in there), there[0] if there else MAIN_METRICS[0])


def find(
    results: Sequence[Result],
    metric: str | None = None,
    *,
    seed: int = 0,
    predictions: Callable[[str], Path] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Findings:
    """Analyze all results, group by group.

    Args:
        metric: what results are judged by; None for the first of `MAIN_METRICS` that a group has.
        seed: of all that is drawn.
        predictions: where the per-sample predictions of a fingerprint are (`Store.predictions`); None for nowhere.
        progress: called with (groups done, groups in all, what is next).

    Raises:
        ValueError: no group says anything.
    """
    groups: dict[Group, list[Result]] = {}
    for result in results:
        groups.setdefault((result.model, result.task, result.method, tuple(sorted(result.factors))), []).append(result)
    reader = Predictions(predictions)
    analyses, left_out = [], []
    for done, (group, members) in enumerate(sorted(groups.items())):
        name = ", ".join(group[:3])
        if progress is not None:
            progress(done, len(groups) + 1, name)
        try:
            analyses.append(analyze(members, metric or main_metric(members), seed=seed, predictions=reader))
        except ValueError as error:
            left_out.append(f"{name}: {error}")
    if not analyses:
        raise ValueError("; ".join(left_out) or "no results to analyze")
    if progress is not None:
        progress(len(groups), len(groups) + 1, "methods")
    comparisons = _comparisons(results, metric, reader, seed)
    return Findings(list(results), analyses, comparisons, left_out + reader.problems)


def _comparisons(results: Sequence[Result], metric: str | None, reader: Predictions, seed: int) -> list[Comparison]:
    subjects: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        subjects.setdefault((result.model, result.task), []).append(result)
    return [
        comparison
        for _, members in sorted(subjects.items())
        for comparison in compare_methods(members, metric or main_metric(members), reader, seed=seed)
    ]
