"""README's table of families, from what quantizing each of them does: ``python python_tests/models/family_table.py``.

A cell is the number of a component's linears in the tiny model of the family, each of which every method quantizes with
calibration data that reached it; or what is different from that.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
COMPONENTS = ("vision", "connector", "language")
METHODS = ("rtn", "gptq", "gptq+", "awq")

sys.path[:0] = [str(README.parent), str(README.parent / "python_tests")]


def makers() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """By the table's name of a family: what makes its tiny model, and calls of that."""
    import tiny_families
    import tiny_vlms

    made = {f"blip2 ({kind})": (lambda k=kind: tiny_vlms.make(k), tiny_vlms.batches) for kind in tiny_vlms.KINDS}
    return made | {name: (tiny.make, lambda model, t=tiny: t.calls()) for name, tiny in tiny_families.TINY.items()}


@cache
def quantized(name: str, method: str) -> tuple[Any, Any]:
    """A family's model, all of it quantized by a method, and the report."""
    from mmq_kernels.models import quantize_model

    make, batches = makers()[name]
    model = make()
    return model, quantize_model(model, f"all={method}:4:g16", batches(model))


def table() -> str:
    """The rows, one a family, in markdown."""
    lines = ["| family | vision | connector | language | left alone |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(cells(name))} |" for name in makers()]
    return "\n".join(lines)


def cells(name: str) -> list[str]:
    """What each method does to each component of one family, and what no recipe reaches without naming it."""
    from mmq_kernels.models import make_plan
    from mmq_kernels.quantize import Recipe

    plan = make_plan(makers()[name][0](), Recipe.parse("all=rtn:4"))
    total = Counter(layer.component for layer in plan.layers.values())
    used: dict[str, Counter[str]] = {}
    folded: Counter[str] = Counter()
    for method in METHODS:
        done = [row for row in quantized(name, method)[1].layers if row.used == method]
        used[method] = Counter(str(plan.layers[row.name].component) for row in done)
        folded += Counter(str(plan.layers[row.name].component) for row in done if row.folded_into)
    found = []
    for component in COMPONENTS:
        count = total[component]
        fewer = [f"{method} {used[method][component]}" for method in METHODS if used[method][component] != count]
        notes = fewer + ([f"awq folds {folded[component]}"] if folded[component] else [])
        found.append(f"{count}{' (' + ', '.join(notes) + ')' if notes else ''}" if count else "")
    return [*found, ", ".join(f"`{name}`" for name in sorted(plan.left_alone))]


def in_readme() -> str:
    text = README.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")
