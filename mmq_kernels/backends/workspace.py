"""Counters for kernels whose blocks wait for each other: zero before and after every launch, so never cleared twice.

Launches on one stream follow each other and share counters. A captured launch may be replayed beside anything, so it
gets counters of its own for good; where none were made beforehand, the capture clears fresh ones at each replay.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 4096
"""Counters allocated at a time for one stream."""

RESERVE = 2**20
"""Counters kept ready for captures on one device: 4 MiB, some 8,000 launches of 8192 x 8192."""


class Counters:
    """int32 zeros by device and stream."""

    def __init__(self) -> None:
        self._by_stream: dict[tuple[int, int], Tensor] = {}
        self._reserve: dict[int, Tensor] = {}

    def take(self, count: int, device: torch.device, stream: int, capturing: bool) -> Tensor:
        """`count` zeros that no other running launch uses.

        Args:
            device: of a CUDA index.
            stream: the handle of the current stream.
            capturing: whether the current stream is being captured into a graph.
        """
        index = device.index
        if capturing:
            return self._take_for_good(count, device)
        key = (index, stream)
        held = self._by_stream.get(key)
        if held is None or held.numel() < count:
            held = torch.zeros(max(count, LEAST), dtype=torch.int32, device=device)
            self._by_stream[key] = held
            if index not in self._reserve:
                self._reserve[index] = torch.zeros(RESERVE, dtype=torch.int32, device=device)
                torch.cuda.synchronize(device)  # zero for every stream, also those that replay graphs
        return held

    def _take_for_good(self, count: int, device: torch.device) -> Tensor:
        reserve = self._reserve.get(device.index)
        if reserve is None or reserve.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)  # recorded, and run at each replay
        self._reserve[device.index] = reserve[count:]
        return reserve[:count]
