"""What GPTQ needs to know of a layer's inputs: their Hessian, and the factor of its inverse."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mmq_kernels.quantize.products import add_product_
from mmq_kernels.quantize.settings import GptqSettings
from mmq_kernels.quantize.triangles import add_lower_gram_, cholesky, invert_lower_, mirror_lower_

DAMPING_ATTEMPTS = 5
"""How often damping is raised tenfold before a Hessian is given up."""


class QuantizationError(RuntimeError):
    """A layer that cannot be quantized as asked, by name."""


class Hessian:
    """``H = 2/N sum x^T x`` of the inputs of one or more layers, fp32 ``[k, k]``."""

    def __init__(self, k: int, device: torch.device) -> None:
        self._sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self._magnitude = torch.zeros(k, dtype=torch.float64, device=device)
        self._scaled = False
        self._drift: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Take in activations ``[..., k]``; not after `value`."""
        assert not self._scaled
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        add_lower_gram_(self._sum, rows)
        self._magnitude += torch.linalg.vector_norm(rows, 1, 0)
        self.rows += rows.shape[0]

    def value(self) -> Tensor:
        """H; zero where nothing was seen. Not a copy: it may be the largest thing in memory."""
        if not self._scaled:
            mirror_lower_(self._sum).mul_(2 / max(1, self.rows))
            self._scaled = True
        return self._sum

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self._sum.numel() * self._sum.element_size()

    def add_drift(self, wanted: Tensor, x: Tensor) -> None:
        """Take in what activations x ``[..., k]`` are in the float model; x goes to `add` too."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self._drift is None:
            self._drift = torch.zeros_like(self._sum)
        add_product_(self._drift, (wanted.reshape(rows.shape).float() - rows).t(), rows)

    def drift(self) -> Tensor | None:
        """``2/N sum (x_float - x)^T x``, fp32 ``[k, k]``, or None where nothing was said of the float model."""
        return None if self._drift is None else self._drift * (2 / max(1, self.rows))

    def magnitude(self) -> Tensor:
        """``mean |x|`` of each channel, fp32 ``[k]``."""
        return (self._magnitude / max(1, self.rows)).float()


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian.

    Attributes:
        hessian: fp32 ``[k, k]``, undamped, columns in input order.
        upper: fp32 ``[k, k]``, upper Cholesky factor of the damped inverse, columns in the order of the work.
        damping: the share of the mean diagonal that it took.
        order: int64 ``[k]``, the input column of each step of the work; None: input order.
    """

    hessian: Tensor
    upper: Tensor
    damping: float
    order: Tensor | None = None

    def damped(self) -> Tensor:
        """The Hessian that `upper` belongs to, in the order of the work."""
        if self.order is None:
            return damped(self.hessian, self.damping)
        return _damp_(_in_order(self.hessian, self.order), self.damping)


def factorize(hessian: Tensor, settings: GptqSettings, name: str) -> Factor:
    """Invert and factor a Hessian, with as much damping as it needs.

    Damping starts at `settings.damping` and is raised tenfold, with a warning, while the matrix is not positive
    definite. Inputs that were always zero get a diagonal of 1: their columns are rounded, never zeroed.

    Raises:
        QuantizationError: naming the layer, when the last attempt fails too.
    """
    if not _finite(hessian):
        raise QuantizationError(f"{name}: its calibration activations hold NaN or infinity")
    damping, order, ordered = settings.damping, None, hessian
    if settings.order != "input":
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        ordered = _in_order(hessian, order)
    for _ in range(DAMPING_ATTEMPTS):
        upper = _upper(ordered, damping)
        if upper is not None:
            return Factor(hessian, upper, damping, order)
        warnings.warn(
            f"{name}: Hessian not positive definite at damping {damping:g}, trying {10 * damping:g}",
            stacklevel=2,
        )
        damping *= 10
    raise QuantizationError(f"{name}: Hessian not positive definite, damping raised to {damping / 10:g} in vain")


def _upper(hessian: Tensor, damping: float) -> Tensor | None:
    """The upper Cholesky factor of the damped inverse, or None; no more than two matrices at a time beside it.

    With J the reversal of rows and columns and ``J H J = L L^T``, it is ``J L^-1 J``: one factorization, and no inverse
    of H is made.
    """
    backward = _damp_(hessian.flip(0, 1), damping)
    lower = cholesky(backward)
    del backward
    if lower is None:
        return None
    upper = invert_lower_(lower).flip(0, 1)
    return upper if _finite(upper) else None


def _in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of ``[k, k]`` in that order; gathering takes a third of the time of two look-ups."""
    return matrix[order].gather(1, order.expand_as(matrix))


def _finite(matrix: Tensor) -> bool:
    """Without a matrix of flags; NaN goes through both extremes."""
    return all(bool(extreme.isfinite()) for extreme in matrix.aminmax())


def damped(hessian: Tensor, damping: float) -> Tensor:
    return _damp_(hessian.clone(), damping)


def _damp_(hessian: Tensor, damping: float) -> Tensor:
    diagonal = hessian.diagonal()
    unseen = diagonal == 0
    diagonal.add_(damping * (float(diagonal.mean()) or 1.0)).masked_fill_(unseen, 1.0)
    return hessian
