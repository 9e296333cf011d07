"""What an allocation may cost: bits per weight, bytes, or milliseconds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

BYTES = {f"{prefix}{infix}b": base**power for power, prefix in enumerate("kmgt", 1) for infix, base in
         (("", 1000), ("i", 1024))}  # fmt: skip
UNITS = ("bpw", "ms", *BYTES)

FORM = "budget must be a number above 0 with its unit behind it, as in 4.0bpw, 2GB (or kB, MB, MiB, GiB) or 30ms"


class BudgetError(ValueError):
    """A budget that is none, or that no allocation meets."""


@dataclass(frozen=True)
class Budget:
    """An upper limit.

    Attributes:
        amount: in `unit`.
        unit: ``bpw`` (bits a weight of the whole model), ``ms``, or one of bytes such as ``GB``.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From ``4.0bpw``, ``2GB``, ``1.5 GiB`` or ``30ms``.

        Raises:
            BudgetError: for anything else.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*", text)
        if found is None or found[2].lower() not in UNITS or not 0 < float(found[1]) < math.inf:
            raise BudgetError(f"{FORM}, got {text!r}")
        return cls(float(found[1]), found[2])

    @property
    def kind(self) -> str:
        """What is counted: ``bpw``, ``bytes`` or ``ms``."""
        unit = self.unit.lower()
        return "bytes" if unit in BYTES else unit

    @property
    def value(self) -> float:
        """The amount in bits a weight, bytes, or milliseconds."""
        return self.amount * BYTES.get(self.unit.lower(), 1)

    def shown(self, value: float) -> str:
        """A cost (bits a weight, bytes, milliseconds) in this budget's unit."""
        amount = value / BYTES.get(self.unit.lower(), 1)
        return f"{amount:.4g}{self.unit}"

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"
