"""What a call costs on each kernel, in seconds, from a few rates: how `select` weighs them. Measured rates go here.

    launches * launch  +  n k * expanded / bandwidth  +  max(bytes / bandwidth, 2 m n k / matmul)

bytes: words and scales of W, x and y; expanded: bytes a weight that a kernel writes and reads again on its way. So the
number of tokens from which dequantizing and the vendor's matmul win over decoding inside the product follows from two
rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmq_kernels.backends import Call

SIZE = 4096
"""Stands for n and k where a call does not say them."""

MATMULS = ("gemm", "prepack")
"""What is weighed as a product; a layout is chosen for the product that it will serve, of one token unless said."""


@dataclass(frozen=True)
class Rates:
    """One kernel on one machine.

    Attributes:
        launches: kernels that it starts, for each product and for each other op.
        expanded: bytes a weight, see above.
        bandwidth, matmul: shares of the machine's that it reaches.
    """

    launches: float
    expanded: float
    bandwidth: float
    matmul: float


UNKNOWN = Rates(launches=1, expanded=0, bandwidth=0.5, matmul=0.5)


@dataclass(frozen=True)
class Costs:
    """A machine.

    Attributes:
        measured_on: its name as torch gives it; None: estimated, measured on none.
        launch: seconds from one kernel to the next.
        bandwidth: bytes a second that a copy reaches.
        matmul: floating-point operations a second that the vendor's half-precision matmul reaches.
        kernels: by "backend" or "backend/kernel".
    """

    measured_on: str | None
    launch: float
    bandwidth: float
    matmul: float
    kernels: Mapping[str, Rates]

    def seconds(self, kernel: str, call: Call) -> float:
        """What `call` takes on `kernel`; one that the table does not know is taken to reach half of everything."""
        rates = self.kernels.get(kernel, UNKNOWN)
        n, k = call.n or SIZE, call.k or SIZE
        m = (1 if call.m is None else call.m) if call.op in MATMULS else 0
        bits = call.spec.bits if call.spec else 8
        scales = 0 if call.spec is None else 2 * n * call.spec.groups(k)
        moved = n * k * bits / 8 + scales + 2 * m * (n + k)
        bandwidth, matmul = rates.bandwidth * self.bandwidth, rates.matmul * self.matmul
        product = max(moved / bandwidth, 2 * m * n * k / matmul)
        return rates.launches * self.launch + n * k * rates.expanded / bandwidth + product

    def __str__(self) -> str:
        return f"measured on {self.measured_on}" if self.measured_on else "estimated, measured on no such machine"


# Rates of an H200; what counts is how they compare, which is much the same on other GPUs (bytes to operations, 1:160).
GPU = Costs(
    None,
    launch=3e-6,
    bandwidth=4.3e12,
    matmul=7e14,
    kernels={
        "cuda/packed": Rates(launches=1, expanded=0, bandwidth=0.8, matmul=0.7),
        "cuda/dense": Rates(launches=2, expanded=4, bandwidth=0.9, matmul=1),
        "triton/packed": Rates(launches=1, expanded=0, bandwidth=0.6, matmul=0.6),
        "triton/dense": Rates(launches=2, expanded=4, bandwidth=0.8, matmul=1),
        "reference": Rates(launches=80, expanded=200, bandwidth=0.8, matmul=0.07),
    },
)

CPU = Costs(
    None,
    launch=5e-6,
    bandwidth=4e10,
    matmul=3e11,
    kernels={
        "cpu": Rates(launches=1, expanded=0, bandwidth=0.8, matmul=0.5),
        "reference": Rates(launches=80, expanded=200, bandwidth=0.5, matmul=0.5),
        # Interpreted, for tests: correct, and never chosen unless asked for.
        "triton/packed": Rates(launches=1e6, expanded=0, bandwidth=1e-3, matmul=1e-3),
        "triton/dense": Rates(launches=1e6, expanded=4, bandwidth=1e-3, matmul=1e-3),
    },
)

MEASURED: tuple[Costs, ...] = ()
"""One entry a GPU; no other place holds a measured rate."""


def costs(device_type: str, gpu: str) -> Costs:
    """The entry measured on a GPU of that name, or the estimate for its kind of device."""
    if device_type in ("cpu", "meta"):
        return CPU
    return next((entry for entry in MEASURED if entry.measured_on == gpu), GPU)
