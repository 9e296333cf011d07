"""What GPTQ carries from columns that are done to those that follow."""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels.quantize.products import add_product_

_NEAR = 512
"""Columns that are brought up to date after every block; those behind them wait for the blocks of as many."""


class Carry:
    """``current[..., end:] -= error @ upper[..., done, end:]``, in two steps.

    A block's error has few columns: what lies far behind is read and written for little work. So it is brought up to
    date for several blocks at once, by one product.

    Args:
        current: fp32 ``[..., n, k]``, modified.
        upper: fp32 ``[..., k, k]``, upper triangular.
    """

    def __init__(self, current: Tensor, upper: Tensor) -> None:
        self.current, self.upper = current, upper
        self._errors: list[Tensor] = []
        self._first = self._done = 0  # columns whose errors wait
        self._near = _NEAR

    def columns(self, start: int, end: int) -> Tensor:
        """``current[..., start:end]``, up to date with all columns that are done."""
        if end > self._near:
            self._settle()
            self._near = max(end, self._done + _NEAR)
        return self.current[..., start:end]

    def add(self, error: Tensor, end: int) -> None:
        """The columns from the last that were done up to `end` are done, and left this error ``[..., n, columns]``."""
        start, self._done = self._done, end
        self._errors.append(error)
        if end < self._near:
            near = slice(end, self._near)
            add_product_(self.current[..., near], error, self.upper[..., start:end, near], alpha=-1)

    def _settle(self) -> None:
        """Columns from `_near` on take what waits."""
        if self._errors:
            waiting, far = slice(self._first, self._done), slice(self._near, None)
            errors = torch.cat(self._errors, -1)
            add_product_(self.current[..., far], errors, self.upper[..., waiting, far], alpha=-1)
        self._errors, self._first = [], self._done
