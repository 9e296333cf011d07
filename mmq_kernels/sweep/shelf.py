"""What is shared between configurations, kept in memory up to a bound; what has gone is made again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

SHARE_OF_MEMORY = 0.25
"""Of the machine's, that may be kept where nobody says how much."""


class Shelf:
    """Anything by key, the least recently used let go of where there is more than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """What was put there, or None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, value: Any, nbytes: int) -> None:
        """Keep something of `nbytes`; what is larger than the whole shelf is not kept."""
        self.drop(key)
        if nbytes > self.max_bytes:
            return
        self._kept[key] = (value, nbytes)
        self.bytes += nbytes
        while self.bytes > self.max_bytes:
            self.drop(next(iter(self._kept)))

    def drop(self, key: Hashable) -> None:
        """Let go of something, if it is there."""
        found = self._kept.pop(key, None)
        if found is not None:
            self.bytes -= found[1]

    def __len__(self) -> int:
        return len(self._kept)


def bytes_of(tensors: Any) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def default_bytes() -> int:
    """A share of the machine's memory."""
    import os

    return int(SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
