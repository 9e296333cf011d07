"""Auxiliary heads: they tell a part directly what it should know, and are thrown away after training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmq_kernels.demo.samples import CLASSES
from mmq_kernels.demo.scenes import BACKGROUNDS, MAX_OBJECTS


class PatchHead(nn.Module):
    """What covers each patch: supervises every output of the ViT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, sum(CLASSES))

    def forward(self, patches: Tensor, labels: Tensor) -> Tensor:
        """Loss of patch features ``[batch, patches, width]`` against labels ``[batch, patches, 3]``."""
        parts = self.classes(patches).split(CLASSES, -1)
        # Most patches show nothing: those that show something weigh as much together.
        weight = torch.where(labels[..., 0] > 0, 1.0, 0.15)
        total = patches.new_zeros(())
        for i, part in enumerate(parts):
            loss = cross_entropy(part.flatten(0, 1), labels[..., i].flatten(), reduction="none")
            total = total + (loss * weight.flatten()).sum() / weight.sum()
        return total


class SlotHead(nn.Module):
    """Query j describes the j-th object from the left, the next query the background: sorted, so nothing to match."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, sum(CLASSES))
        self.ground = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, queries: Tensor, labels: Tensor, grounds: Tensor) -> Tensor:
        """Loss of query outputs ``[batch, queries, width]`` against the labels of `samples.slot_labels`."""
        parts = self.classes(queries[:, :MAX_OBJECTS]).split(CLASSES, -1)
        total = cross_entropy(self.ground(queries[:, MAX_OBJECTS]), grounds)
        for i, part in enumerate(parts):
            total = total + cross_entropy(part.flatten(0, 1), labels[..., i].flatten())
        return total
