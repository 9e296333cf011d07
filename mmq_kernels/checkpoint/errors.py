"""What can be wrong with a checkpoint; one line each, naming the file or tensor and the remedy."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A folder is no model, or its files are missing, damaged, of another version, or cannot be written."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, 1500))


def shortened(text: str, most: int = 300) -> str:
    """One line of it, for a message."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."
