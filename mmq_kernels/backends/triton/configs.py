"""Tile sizes of the Triton product: a table for known GPUs, and what the autotuner tries on others. No GPU needed."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from mmq_kernels.spec import QuantSpec, ceil_div

TOKEN_TILES = (16, 32, 64, 128)
"""Tokens of a tile; a call takes the smallest that holds all of them, or the largest."""

LEAST_BLOCK = 16
"""Of each side of a step: what tensor cores take."""

LEAST_STEPS = 4
"""Steps of k that a share of a split product has at least."""

SCALED_SUMS = 64
"""Up to so many tokens a tile, scaling the sums of a step costs no more than scaling its weights."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    block_m, block_n, block_k: tokens, rows of W and columns of W of one step of a program; powers of two.
    warps: of a program.
    stages: steps whose loads are under way at a time.
    waves: programs that each multiprocessor should get; k is split where tiles give fewer.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    waves: int

    def __post_init__(self) -> None:
        for name, value in zip(self.__dataclass_fields__, astuple(self), strict=True):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("block_m", "block_n", "block_k", "warps"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if min(self.block_m, self.block_n, self.block_k) < LEAST_BLOCK:
            raise ValueError(
                f"blocks must be at least {LEAST_BLOCK}, got {self.block_m} x {self.block_n} x {self.block_k}"
            )

    def splits(self, m: int, n: int, k: int, multiprocessors: int) -> int:
        """Shares of k, so that there are about `waves` programs for each multiprocessor."""
        tiles = ceil_div(m, self.block_m) * ceil_div(n, self.block_n)
        steps = ceil_div(k, self.block_k)
        wanted = min(self.waves * multiprocessors // tiles, steps // LEAST_STEPS)
        if wanted < 2:
            return 1
        return ceil_div(steps, ceil_div(steps, wanted))  # no share is empty

    def fitted(self, spec: QuantSpec, k: int, wide_scales: bool) -> tuple[Config, str]:
        """The configuration for a weight, and where its scales enter (see gemm.py).

        Scales multiply sums where steps end with groups, for which steps are made as short as it takes: up to 64
        tokens, where that costs little and nothing is rounded but the result; and wherever scales are fp32, because a
        weight that one has multiplied would be rounded twice on its way to half precision.

        Args:
            wide_scales: whether they are fp32.
        """
        if spec.groups(k) == 1:
            return self, "row"
        length = spec.group_length(k)
        whole = min(self.block_k, length & -length)  # the largest power of two in it
        if whole >= LEAST_BLOCK and (wide_scales or self.block_m <= SCALED_SUMS):
            return replace(self, block_k=whole), "after"
        return self, weight_scales(spec, k, self.block_k)


def weight_scales(spec: QuantSpec, k: int, block_k: int) -> str:
    """For which columns of a step one scale multiplies weights."""
    length = spec.group_length(k)
    if spec.groups(k) == 1 or length % block_k == 0:
        return "tile"
    return "pair" if length % (32 // spec.planes[0]) else "word"


def token_tile(m: int) -> int:
    return next((tile for tile in TOKEN_TILES if tile >= m), TOKEN_TILES[-1])


# Reasoned from the machine code (`python_tests/backends/test_triton_code.py`), not measured: no GPU has run them. Few
# tokens: the words must be under way all the time, so deep pipelines of small tiles, and k split until every
# multiprocessor has several programs. With 16 rows of W a warp, Triton loads words straight into the threads that
# decode them for the tensor cores; with more it stores decoded weights to shared memory first, which pays where
# several warps share them, as they do for many tokens without wgmma.
_MMA = {
    16: Config(16, 64, 128, warps=4, stages=4, waves=4),
    32: Config(32, 64, 128, warps=4, stages=4, waves=4),
    64: Config(64, 128, 64, warps=4, stages=3, waves=2),
    128: Config(128, 256, 32, warps=8, stages=3, waves=1),
}
_WGMMA = {
    16: Config(16, 64, 128, warps=4, stages=4, waves=4),
    32: Config(32, 64, 128, warps=4, stages=4, waves=4),
    64: Config(64, 64, 128, warps=4, stages=4, waves=2),
    128: Config(128, 128, 64, warps=8, stages=4, waves=1),
}
# 64 KiB of shared memory, no asynchronous copies into it: two stages are registers and one buffer.
_AMD = {
    16: Config(16, 64, 128, warps=4, stages=2, waves=4),
    32: Config(32, 64, 128, warps=4, stages=2, waves=4),
    64: Config(64, 64, 64, warps=4, stages=2, waves=2),
    128: Config(128, 128, 64, warps=8, stages=2, waves=1),
}
_INTEL = {tile: Config(tile, 64, 64, warps=8, stages=2, waves=2) for tile in TOKEN_TILES}

KNOWN = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"), _MMA),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), _WGMMA),
    **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), _AMD),
}
"""Configurations by architecture and token tile."""


def table_config(arch: str, m: int) -> Config | None:
    """The table's entry for an architecture, or None where it has none."""
    entry = KNOWN.get(arch)
    return None if entry is None else entry[token_tile(m)]


def default_config(arch: str, m: int) -> Config:
    """What serves while nothing better is known, on whatever GPU."""
    family = _AMD if arch.startswith("gfx") else _MMA if arch.startswith("sm_") else _INTEL
    return table_config(arch, m) or family[token_tile(m)]


def candidates(arch: str, m: int) -> list[Config]:
    """What the autotuner measures, the default first; every tile of it is known to be right."""
    first = default_config(arch, m)
    tile = first.block_m
    if tile <= 32:
        shapes = [(32, 128), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128)]
        choices = [(4, 2), (4, 4)]
    elif tile == 64:
        shapes = [(64, 64), (64, 128), (128, 64), (128, 32)]
        choices = [(4, 1), (4, 2), (8, 1), (8, 2)]
    else:
        shapes = [(64, 64), (128, 32), (128, 64), (256, 64)]
        choices = [(4, 1), (8, 1)]
    found = [
        Config(tile, block_n, block_k, warps, first.stages, waves)
        for block_n, block_k in shapes
        for warps, waves in choices
    ]
    return [first, *(config for config in found if config != first)]
