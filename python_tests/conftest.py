"""What every test needs: quiet threads, and seeds that do not depend on the order of the tests."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SINGLY = {"test_cuda_mutants", "test_triton_interpreted"}
"""Files whose tests share nothing: they come last, and fill whichever worker is idle."""


@pytest.hookimpl(tryfirst=True)  # xdist looks for the mark in the same hook, and was registered later
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file stays on one worker, for what its tests share; some are dealt out singly."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if item.path.stem not in SINGLY:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)
