"""The shipped miniatures: really trained tiny VLMs, and a world of rendered scenes to calibrate and score them on."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = ("blip2", "blip2-itm", "llava")
"""Trained models that come with the package."""


def weights_folder(name: str) -> Path:
    """Folder of a shipped model, as `from_pretrained` takes it.

    Raises:
        ValueError: for a model that is not shipped.
    """
    if name not in WEIGHTS:
        raise ValueError(f"shipped models are {', '.join(WEIGHTS)}, got {name!r}")
    return Path(__file__).parent / "weights" / name
