"""A small world of rendered scenes, and a grid on the shipped BLIP-2, for all tests of sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = WorldSize(train=16, images=6, questions=2, gallery=4)
    return write_world(tmp_path_factory.mktemp("sweep") / "world", seed=3, size=size)


@pytest.fixture(scope="session")
def content(world: Path) -> dict[str, Any]:
    """Of a grid file: 2 x 2 x 2 by GPTQ on captions and questions."""
    return {
        "model": str(weights_folder("blip2")),
        "tasks": {"caption": str(world / "coco"), "vqa": {"data": str(world / "vqav2"), "limit": 8}},
        "calibration": {"data": [f"caption:{world / 'coco'}", f"vqa:{world / 'vqav2'}"], "samples": 8},
        "methods": ["gptq"],
        "bits": [2, 4],
        "group_size": 64,
        "evaluation": {"meteor": False, "tokenizer": "plain", "batch_size": 8},
    }
