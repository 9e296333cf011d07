"""The variants that the demo compares: a method, and bits for each component."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mmq_kernels.quantize.recipe import COMPONENTS, LEFT_ALONE

GROUP = 64
METHODS = ("uniform", "rtn", "gptq")


@dataclass(frozen=True)
class Variant:
    """One row of the demo's table.

    Attributes:
        name: heading of the row.
        series: rows of one series are joined in the plots.
        method: uniform, rtn or gptq; "" for the model as trained.
        bits: of vision, connector and language; 16 leaves a component as trained.
    """

    name: str
    series: str
    method: str = ""
    bits: tuple[int, int, int] = (LEFT_ALONE,) * 3

    def recipe(self, components: tuple[str, ...] = COMPONENTS) -> str:
        """The recipe for a model with these components; empty where nothing is to be quantized."""
        granularity = "" if self.method == "uniform" else f":g{GROUP}"
        return " ".join(
            f"{component}={self.method}:{bits}{granularity}"
            for component, bits in zip(COMPONENTS, self.bits, strict=True)
            if bits != LEFT_ALONE and component in components
        )


def standard_variants() -> list[Variant]:
    """fp32; each method with everything at 4, 3 and 2 bits; each component alone at 2 bits."""
    rows = [Variant("fp32", "fp32")]
    for method in METHODS:
        rows += [Variant(f"{method} {bits} bits", method, method, (bits, bits, bits)) for bits in (4, 3, 2)]
    for i, component in enumerate(COMPONENTS):
        first, second, third = (2 if j == i else LEFT_ALONE for j in range(3))
        rows.append(Variant(f"{component} alone, rtn 2 bits", f"{component} alone", "rtn", (first, second, third)))
    return rows


def all_variants() -> list[Variant]:
    """The standard ones, then every combination of 2, 3, 4 and 16 bits with every method."""
    rows = {(row.method, row.bits): row for row in standard_variants()}
    for method in METHODS:
        widths = (2, 3, 4, LEFT_ALONE)
        for bits in itertools.product(widths, widths, widths):
            if bits != (LEFT_ALONE,) * 3:
                row = Variant(f"{method} {'/'.join(map(str, bits))}", f"{method}, mixed", method, bits)
                rows.setdefault((method, bits), row)
    return list(rows.values())
