"""What can be wrong with a checkpoint; one line each, naming the file or tensor and the remedy."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A folder is no model, or its files are missing, damaged, of another version, or cannot be written."""
