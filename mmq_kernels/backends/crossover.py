"""From how many tokens on a GPU dequantizes and multiplies densely instead of decoding inside the product.

The packed kernel reads `bits / 16` of the bytes, but decodes every weight once for each block of 88 tokens and does not
reach the vendor's rate. So from some m on, writing the weight once in half precision and handing it to the vendor's
matmul is faster. Where, only a measurement on that GPU can say (`mmq bench gemm` prints both).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Crossover:
    """Attributes:
    measured_on: the GPU, as CUDA names it; None: estimated, measured on none.
    dense_from: fewest tokens that go the dense way.
    """

    measured_on: str | None
    dense_from: int

    def __str__(self) -> str:
        origin = f"measured on {self.measured_on}" if self.measured_on else "estimated, measured on no GPU"
        return f"crossover at m = {self.dense_from}, {origin}"


# Estimate for an 8192 x 8192 weight on an H200, for want of a measurement: dequantizing moves 4.5 bytes a weight, 70 us
# at 4.3 TB/s; the packed kernel at 0.7 of the vendor's 0.2 us a token loses 0.086 us a token: equal near 820.
ESTIMATE = Crossover(None, 1024)

MEASURED: tuple[Crossover, ...] = ()
"""One entry a GPU; no other place holds a crossover."""


def crossover(gpu: str) -> Crossover:
    """The entry measured on a GPU of that name, or the estimate."""
    return next((entry for entry in MEASURED if entry.measured_on == gpu), ESTIMATE)
