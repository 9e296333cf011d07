"""A small world for allocations to be made in."""

from pathlib import Path

import pytest

from mmq_kernels.demo.world import WorldSize, write_world


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = WorldSize(train=24, images=6, questions=2, gallery=12)
    return write_world(tmp_path_factory.mktemp("allocation") / "world", seed=5, size=size)
