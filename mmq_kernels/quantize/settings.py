"""How GPTQ is done."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmq_kernels.quantize.grids import Grid

ORDERS = ("input", "activation", "static")


@dataclass(frozen=True)
class GptqSettings:
    """Attributes:
    damping: added to the Hessian's diagonal, as a share of its mean.
    order: of the columns: "input"; "activation": those with the largest inputs first, and grouped by that order; or
        "static": in that order too, but grouped as the input has them, on the grids of the weights as given, so that a
        layer needs no index of its columns' groups.
    grid: of a group: "minmax", "percentile", or "search": the share of its range that its corrected weights want.
    percentile: of the grid "percentile", above 50 and at most 100.
    block_size: columns after which errors are carried on to later ones; a group of this size or less is never
        split. Without descent, results differ by rounding only.
    rounds: of descent on codes, scales and zero points behind the columns (refine.py). Above 0, groups also see descent
        of their own before later columns make their errors good (groups.py).
    catch_up: how far, from 0 to 1, a layer makes good what the quantized blocks before it did to its input: at 1 its
        target is what the float model puts out there (`caught_up`).
    """

    damping: float = 0.01
    order: str = "input"
    grid: str = "minmax"
    percentile: float = Grid.percentile
    block_size: int = 128
    rounds: int = 0
    catch_up: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {self.damping}")
        if not 0 <= self.catch_up <= 1:
            raise ValueError(f"catch_up must be from 0 to 1, got {self.catch_up}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        self.grids()
        for name, value, least in (("block_size", self.block_size, 1), ("rounds", self.rounds, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def grids(self) -> Grid:
        """How grids are found."""
        return Grid(self.grid, self.percentile)

    def beyond(self) -> GptqSettings:
        """These, and all that makes GPTQ better: what the method "gptq+" stands for."""
        order = "activation" if self.order == "input" else self.order
        grid = "search" if self.grid == "minmax" else self.grid
        return replace(self, order=order, grid=grid, rounds=max(self.rounds, 1))


DEFAULT = GptqSettings()
