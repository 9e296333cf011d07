"""What can be wrong with an evaluation's input; one line each, naming the place or the remedy."""

from __future__ import annotations


class DataError(ValueError):
    """A data folder, annotation file or image is missing, of another layout, damaged or too small."""


class ModelMismatch(ValueError):
    """The model (or its processor) cannot do the task that was asked of it."""
