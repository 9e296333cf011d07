"""What every test needs: quiet threads, and seeds that do not depend on the order of the tests."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)
