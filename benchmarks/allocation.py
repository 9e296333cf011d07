"""Allocations of `mmq allocate` beside every uniform one of at most their budget, on held-out scenes.

    python benchmarks/allocation.py [--model blip2 --task vqa] [--method gptq] [--budgets 3.0bpw,3.5bpw,4.0bpw]

The budget is met on the training split of the demo's world; then the recipe, all uniform allocations within the budget
(any width, group sizes 32, 64, 128 and a whole row, both symmetries; of each kind the widest that fits) and all with
one width a component (group 64; those of which no component can be widened) are scored on the evaluation split.
Differences are to the best of each kind, with paired 95% bootstrap intervals. Lines are appended.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from recorded import RESULTS

from mmq_kernels import checkpoint
from mmq_kernels import eval as evaluation
from mmq_kernels.bench.record import append, provenance
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.models import component_prefixes, quantize_model
from mmq_kernels.spec import BITS
from mmq_kernels.sweep.allocation import AllocationOptions, BudgetError, allocate

FOLDERS = {"caption": "coco", "vqa": "vqav2", "retrieval": "flickr30k"}
SIZE = WorldSize(train=512, images=300, questions=5, gallery=300)
GROUPS = ("g32", "g64", "g128", "channel")
MATCHED = "g64:asym"
MAIN = {"caption": "cider", "vqa": "accuracy", "retrieval": "text_r1"}
OPTIONS = evaluation.EvalOptions(batch_size=100, meteor=False, top_k=4)


class Bench:
    """One model, task and method."""

    def __init__(self, model: str, task: str, method: str, world: Path) -> None:
        self.folder, self.task, self.method = weights_folder(model), task, method
        self.data = world / FOLDERS[task]
        processor = checkpoint.load_processor(self.folder)
        one = 1 if task == "retrieval" else None
        self.prepared = evaluation.prepare(task, self.data, processor, captions_per_image=one)
        source = CalibrationSource.parse([f"{task}:{self.data}"], 128)
        assert source is not None
        self.source = source
        base = self.load()
        self.batches = source.batches(base, processor)
        self.components = tuple(component_prefixes(base))
        self.found: dict[str, tuple[evaluation.EvalResult, float]] = {}
        self.weighed: dict[str, int] = {}
        self.weights = evaluation.model_size(base).weights
        self.bits("")

    def load(self) -> Any:
        return checkpoint.load(self.folder)

    def bits(self, recipe: str) -> int:
        """That recipes add to the float model's; by round to nearest, which weighs the same as the method.

        16 bits count for what is left alone, as the folder stores it.
        """
        if recipe not in self.weighed:
            model = self.load()
            if recipe:
                quantize_model(model, recipe.replace(f"={self.method}:", "=rtn:"))
            self.weighed[recipe] = evaluation.model_size(model, float_bits=16).weight_bits
        return self.weighed[recipe] - self.weighed.get("", 0)

    def bpw(self, recipes: list[str]) -> float:
        """Of a model under recipes for different components."""
        return (self.weighed[""] + sum(self.bits(recipe) for recipe in recipes)) / self.weights

    def score(self, recipe: str) -> tuple[evaluation.EvalResult, float]:
        """On the evaluation split, and bits a weight."""
        if recipe not in self.found:
            model = self.load()
            quantize_model(model, recipe, self.batches)
            result = evaluation.evaluate_prepared(model, self.prepared, options=OPTIONS)
            self.found[recipe] = result, evaluation.model_size(model, float_bits=16).bpw
        return self.found[recipe]

    def uniform(self, limit: float) -> list[str]:
        """Of each group size and symmetry the widest within the limit."""
        recipes = []
        for group, symmetry in itertools.product(GROUPS, ("asym", "sym")):
            fitting = [
                recipe for bits in BITS if self.bpw([recipe := f"all={self.method}:{bits}:{group}:{symmetry}"]) <= limit
            ]
            recipes += fitting[-1:]
        return recipes

    def by_component(self, limit: float) -> list[str]:
        """All with one width a component of which none can be widened."""
        widths = BITS[:6]
        fits = {
            bits: self.bpw(self._components(bits)) <= limit
            for bits in itertools.product(widths, repeat=len(self.components))
        }

        def maximal(bits: tuple[int, ...]) -> bool:
            wider = [(*bits[:i], bits[i] + 1, *bits[i + 1 :]) for i in range(len(bits))]
            return not any(fits.get(one, False) for one in wider)

        return [
            " ".join(self._components(bits))
            for bits, fit in fits.items()
            if fit and len(set(bits)) > 1 and maximal(bits)
        ]

    def _components(self, bits: tuple[int, ...]) -> list[str]:
        pairs = zip(self.components, bits, strict=True)
        return [f"{component}={self.method}:{width}:{MATCHED}" for component, width in pairs]

    def beside(self, recipe: str, others: list[str]) -> dict[str, Any]:
        """By metric the best of the others, and by how much the recipe is better (NLL: lower) than that."""
        ours, _ = self.score(recipe)
        scored = {other: self.score(other) for other in others}
        found: dict[str, Any] = {"models": len(others)}
        for metric in ("nll", MAIN[self.task], *(["image_r1"] if self.task == "retrieval" else [])):
            if not scored or ours.metrics.get(metric) is None:
                continue
            sign = -1 if metric == "nll" else 1
            best = max(scored, key=lambda other: sign * scored[other][0].metrics[metric])
            result, bpw = scored[best]
            found[metric] = {
                "recipe": best,
                "bpw": bpw,
                "value": result.metrics[metric],
                "difference": vars(evaluation.compare(ours, result)[metric]),
            }
        return found

    def run(self, budget: str, work: Path, evaluations: int) -> dict[str, Any]:
        started = time.perf_counter()
        row: dict[str, Any] = {"bench": "allocation", "task": self.task, "method": self.method, "budget": budget}
        try:
            report = allocate(
                self.folder,
                budget,
                self.task,
                self.data,
                work / f"{self.task}-{self.method}-{budget}",
                calibration=self.source,
                options=AllocationOptions(method=self.method, evaluations=evaluations),
                measurements=work / f"{self.task}-{self.method}.jsonl",
            )
        except BudgetError as error:
            return row | {"refused": str(error)}
        seconds = time.perf_counter() - started
        limit = float(budget.removesuffix("bpw"))
        result, bpw = self.score(report["recipe"])
        whole, _ = self.score("all=16")
        return row | {
            "bpw": bpw,
            "recipe": report["recipe"],
            "why": report["cost"]["why"],
            "held_out": {name: value for name, value in result.metrics.items() if value is not None},
            "float": {name: value for name, value in whole.metrics.items() if value is not None},
            "samples": result.samples,
            "uniform": self.beside(report["recipe"], self.uniform(limit)),
            "by_component": self.beside(report["recipe"], self.by_component(limit)),
            "evaluations": evaluations,
            "seconds": round(seconds, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "allocation.jsonl", help="file to append to")
    parser.add_argument("--model", default="blip2")
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--budgets", default="3.0bpw,3.5bpw,4.0bpw")
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--work", type=Path, help="folder that keeps what was measured, for a run that is killed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        world = write_world(work / "world", seed=3, size=SIZE)
        about = provenance()
        bench = Bench(options.model, options.task, options.method, world)
        for budget in options.budgets.split(","):
            row = {"model": options.model} | bench.run(budget, work / options.model, options.evaluations)
            append(options.out, [row | about])
            print(row, flush=True)


if __name__ == "__main__":
    main()
