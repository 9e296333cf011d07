"""What a quantized weight is: how many bits, how weights share a scale, and which bit planes hold a code.

Equation of the whole package: ``W[n, k] ~ scale[n, g] * (q[n, k] - zero[n, g])`` with ``g = k // group_size``.
"""

from __future__ import annotations

from dataclasses import dataclass

BITS = tuple(range(2, 9))
"""Every bit width a code can have; 16 means "left alone" and never reaches a QuantSpec."""

PER_CHANNEL = -1
"""The group size of one scale for a whole row."""

GROUP_MULTIPLE = 8
"""Group sizes are multiples of this, so that a group starts where a kernel's unit of columns starts."""

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class QuantSpec:
    """How the weight of one linear layer is stored.

    Args:
        bits: 2..8, width of a code.
        group_size: consecutive weights along k that share a scale and a zero point; a positive multiple of 8,
            or -1 for the whole row. The last group of a row may be shorter.
        symmetric: ``zero = 2**(bits - 1)`` everywhere and is not stored.

    Raises:
        ValueError: naming the field, what it must be, and the value got.
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        size = self.group_size
        valid = type(size) is int and (size == PER_CHANNEL or (size > 0 and size % GROUP_MULTIPLE == 0))
        if not valid:
            raise ValueError(f"group_size must be -1 or a positive multiple of {GROUP_MULTIPLE}, got {size!r}")
        if type(self.symmetric) is not bool:
            raise ValueError(f"symmetric must be true or false, got {self.symmetric!r}")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def middle_code(self) -> int:
        """The zero point of a symmetric weight."""
        return 2 ** (self.bits - 1)

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes of a code, lowest bits first: 7 = 4 + 2 + 1."""
        return _PLANES[self.bits]

    def groups(self, k: int) -> int:
        """Number of groups of a row of k weights, the ragged last one included."""
        return 1 if self.group_size == PER_CHANNEL else ceil_div(k, self.group_size)

    def group_length(self, k: int) -> int:
        """Columns that one scale covers in a row of k weights."""
        return k if self.group_size == PER_CHANNEL else min(self.group_size, k)

    def words(self, count: int) -> int:
        """32-bit words that a dense stream of `count` codes takes."""
        return ceil_div(count * self.bits, 32)

    def plane_words(self, k: int) -> int:
        """32-bit words that the bit planes of a row of k codes take."""
        return sum(ceil_div(k * width, 32) for width in self.planes)

    def __str__(self) -> str:
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        return f"{self.bits}bit:{group}:{'sym' if self.symmetric else 'asym'}"
