"""What can be wrong with a checkpoint; one line each, naming the file or tensor and the remedy."""

from __future__ import annotations

from mmq_kernels.quantize.untrusted import shortened

__all__ = ["CheckpointError", "shortened"]


class CheckpointError(ValueError):
    """A folder is no model, or its files are missing, damaged, of another version, or cannot be written."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, 1500))
