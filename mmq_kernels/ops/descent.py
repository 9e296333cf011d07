"""What goes on behind GPTQ's loop: a group's grid searched for, and descent on its scale, zero point and codes.

Plain functions, for quantizers alone: nothing traces or differentiates through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels import backends
from mmq_kernels.backends.descent import Descended
from mmq_kernels.ops.choice import select
from mmq_kernels.spec import QuantSpec


def search_grid(weight: Tensor, importance: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The grid of each row of one group, narrower than its extremes where clipping a few weights serves the others.

    ``scale, zero = argmin over p of  sum_j importance_j * (w_j - scale_p * (q_j - zero_p))^2`` with the min-max grid of
    the range ``[p * low, p * high]``, p tried coarsely first and then around the best.

    Args:
        weight: fp32 ``[n, B]``.
        importance: fp32 ``[B]``, positive: what an error in a column costs.
        spec: bits and symmetry; all columns are one group.

    Returns:
        scale ``[n]`` in `scale_dtype`, zero uint8 ``[n]``.

    Raises:
        ValueError: for shapes or dtypes that are others.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32:
        raise ValueError(f"weight must be fp32 [n, B], got {weight.dtype} {list(weight.shape)}")
    if importance.shape != weight.shape[1:] or importance.dtype != torch.float32:
        raise ValueError(f"importance must be fp32 [B], got {importance.dtype} {list(importance.shape)}")
    return _backend(weight, spec).search_grid(weight, importance, spec, scale_dtype)


def descend(
    gradient: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
) -> Descended:
    """One round of descent on the error ``d H d^T`` of one group, ``d = w^ - w``; what helps no row is not done to it.

    * the scale moves to its optimum ``s - (g . v) / (v H v)``, ``v = q - zero``, rounded to `scale_dtype`;
    * the zero point of an asymmetric grid moves by one;
    * each code, one column after another, gets the value that is best with all others as they are.

    Args:
        gradient: fp32 ``[n, B]``: ``d H`` over all columns of the layer, on those of the group.
        hessian: fp32 ``[B, B]``, its block of the group, with a positive diagonal.
        codes: uint8 ``[n, B]``.
        scale, zero: ``[n]``, fp32 (values that `scale_dtype` holds) and uint8.

    Returns:
        The group after the round, and what has changed; no argument is written to.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    n, columns = codes.shape
    for name, tensor, shape in (
        ("gradient", gradient, (n, columns)),
        ("hessian", hessian, (columns, columns)),
        ("scale", scale, (n,)),
        ("zero", zero, (n,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    return _backend(gradient, spec).descend(gradient, hessian, codes, scale, zero, spec, scale_dtype)


def _backend(tensor: Tensor, spec: QuantSpec) -> backends.Backend:
    """The one that serves `gptq_block`, whose work this is."""
    return backends.backend(select("gptq_block", tensor.device, spec=spec, dtype=torch.float32).backend)
