"""README's table of families, from what quantizing each of them does: ``python python_tests/models/family_table.py``.

A cell is the number of a component's linears in the tiny model of the family, each of which every method quantizes with
calibration data that reached it; or what is different from that.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
COMPONENTS = ("vision", "connector", "language")
METHODS = ("rtn", "gptq", "gptq+", "awq")

sys.path[:0] = [str(README.parent), str(README.parent / "python_tests")]


def table() -> str:
    """The rows, one a family, in markdown."""
    import tiny_families
    import tiny_vlms

    lines = ["| family | vision | connector | language | left alone |", "|---|---|---|---|---|"]
    makers = {f"blip2 ({kind})": (lambda k=kind: tiny_vlms.make(k), tiny_vlms.batches) for kind in tiny_vlms.KINDS}
    makers |= {name: (tiny.make, lambda model, t=tiny: t.calls()) for name, tiny in tiny_families.TINY.items()}
    for name, (make, batches) in makers.items():
        lines.append(f"| {name} | {' | '.join(cells(make, batches))} |")
    return "\n".join(lines)


def cells(make, batches) -> list[str]:
    """What each method does to each component of one family, and what no recipe reaches without naming it."""
    from mmq_kernels.models import make_plan, quantize_model
    from mmq_kernels.quantize import Recipe

    plan = make_plan(make(), Recipe.parse("all=rtn:4"))
    total = Counter(layer.component for layer in plan.layers.values())
    used: dict[str, Counter[str]] = {}
    folded: Counter[str] = Counter()
    for method in METHODS:
        model = make()
        report = quantize_model(model, f"all={method}:4:g16", batches(model))
        done = [row for row in report.layers if row.used == method]
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
