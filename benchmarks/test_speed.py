"""A handful of linears under pytest-benchmark, for comparing two commits on one machine. No time is asserted.

pytest benchmarks/test_speed.py --benchmark-autosave, then --benchmark-compare on the other commit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmq_kernels.bench.layers import random_layer
from mmq_kernels.bench.timing import captured, synchronize
from mmq_kernels.spec import BITS, QuantSpec

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'mmq_kernels[bench]'")

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.float16 if ON_CUDA else torch.float32
SIZE = 4096
WIDTHS, TOKENS = (BITS, (1, 16, 64, 257)) if ON_CUDA else ((2, 4, 8), (1, 16))


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_linear(benchmark: Any, bits: int, m: int) -> None:
    """One weight, found in the cache after the first call: `mmq bench` rotates weights, this compares commits."""
    layer = random_layer(SIZE, SIZE, QuantSpec(bits, 128), DEVICE, DTYPE)
    x = torch.randn(m, SIZE, device=DEVICE).to(DTYPE)
    benchmark.extra_info |= {"device": str(DEVICE), "backend": layer.backend}
    with torch.no_grad():
        graph = captured(lambda _: layer(x), 1, DEVICE) if ON_CUDA else None

        def call() -> None:
            if graph:
                graph.replay()
                synchronize(DEVICE)
            else:
                layer(x)

        benchmark(call)
