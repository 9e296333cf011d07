"""Outputs that kernels get are poisoned: torch fills what `torch.empty` returns with NaN or the largest integer."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
