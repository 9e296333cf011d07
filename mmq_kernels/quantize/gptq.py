"""GPTQ: quantize one column after another, each error made good by the columns still to come.

For a layer ``y = x W^T`` with Hessian ``H = 2/N sum x^T x`` and ``U`` the upper Cholesky factor of ``H^-1``:

    q_j  = nearest code of w_j
    e_j  = (w_j - scale * (q_j - zero)) / U[j, j]
    w_i -= e_j * U[j, i]                               for every later column i

Columns are taken in blocks: `ops.gptq_block` works inside a block, one matmul carries its errors to the rest.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for GPT (arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.backends.blocks import grid_blocks
from mmq_kernels.quantize.rtn import Quantized, check_finite, choose_scale_dtype
from mmq_kernels.spec import PER_CHANNEL, QuantSpec

BLOCK = 128
"""Columns a block has at most; a block never splits a group of this size or less."""

DAMPING_ATTEMPTS = 5
"""How often damping is raised tenfold before a Hessian is given up."""


class QuantizationError(RuntimeError):
    """A layer that cannot be quantized as asked, by name."""


@dataclass(frozen=True)
class GptqSettings:
    """Attributes:
    damping: added to the Hessian's diagonal, as a share of its mean.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {self.damping}")


class Hessian:
    """``H = 2/N sum x^T x`` of the inputs of one or more layers, fp32 ``[k, k]``."""

    def __init__(self, k: int, device: torch.device) -> None:
        self._sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Take in activations ``[..., k]``."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self._sum.addmm_(rows.t(), rows)
        self.rows += rows.shape[0]

    def value(self) -> Tensor:
        """H; zero where nothing was seen."""
        return self._sum * (2 / max(1, self.rows))


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian.

    Attributes:
        hessian: fp32 ``[k, k]``, undamped.
        upper: fp32 ``[k, k]``, upper Cholesky factor of the damped inverse.
        damping: the share of the mean diagonal that it took.
    """

    hessian: Tensor
    upper: Tensor
    damping: float


def factorize(hessian: Tensor, settings: GptqSettings, name: str) -> Factor:
    """Invert and factor a Hessian, with as much damping as it needs.

    Damping starts at `settings.damping` and is raised tenfold, with a warning, while the matrix is not positive
    definite. Inputs that were always zero get a diagonal of 1: their columns are rounded, never zeroed.

    Raises:
        QuantizationError: naming the layer, when the last attempt fails too.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise QuantizationError(f"{name}: its calibration activations hold NaN or infinity")
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    damping = settings.damping
    for _ in range(DAMPING_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal().masked_fill_(diagonal == 0, 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return Factor(hessian, upper, damping)
        warnings.warn(
            f"{name}: Hessian not positive definite at damping {damping:g}, trying {10 * damping:g}",
            stacklevel=2,
        )
        damping *= 10
    raise QuantizationError(f"{name}: Hessian not positive definite, damping raised to {damping / 10:g} in vain")


def gptq(weight: Tensor, factor: Factor, spec: QuantSpec) -> Quantized:
    """The codes of `weight` ``[n, k]`` under the Hessian in `factor`.

    The grid of a group comes from the group's weights as corrected so far; that of a whole row from the weights as
    given.

    Raises:
        ValueError: for NaN or infinity in the weight.
    """
    check_finite(weight)
    scale_dtype = choose_scale_dtype(weight, spec)
    current = weight.to(torch.float32, copy=True)
    k = weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for start, end, grid_end in grid_blocks(k, spec, BLOCK):
        scale = zero = None
        inside = spec
        if grid_end is not None:
            inside = QuantSpec(spec.bits, PER_CHANNEL, spec.symmetric)
            if grid_end > 0:
                _, scale, zero = ops.quantize_rtn(current[:, start:grid_end].contiguous(), inside, scale_dtype)
                scales.append(scale)
                zeros.append(zero)
            scale, zero = scales[-1], zeros[-1]
        part = current[:, start:end].contiguous()
        upper = factor.upper[start:end, start:end].contiguous()
        codes[:, start:end], error, found_scale, found_zero = ops.gptq_block(
            part, upper, scale, zero, inside, scale_dtype
        )
        if grid_end is None:
            scales.append(found_scale)
            zeros.append(found_zero)
        if end < k:
            current[:, end:].addmm_(error, factor.upper[start:end, end:], alpha=-1)
    return Quantized(codes, torch.cat(scales, 1), torch.cat(zeros, 1))


def weighted_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """``tr(E H E^T) / tr(W H W^T)`` with ``E = W - W^``: the share of the layer's output lost, squared."""
    weight = weight.float()
    error = weight - quantized.float()
    lost = float(((error @ hessian) * error).sum(dtype=torch.float64))
    whole = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0
