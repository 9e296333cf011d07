"""The tensors of a quantized weight in a checkpoint (DESIGN 4.1): their names, and what each must be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmq_kernels.nn.order import check_group_index
from mmq_kernels.spec import QuantSpec

ON_DISK = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_input_scale",
)
"""Names a quantized weight has in a checkpoint; the zero points and the last two are not always there."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def stored_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """n and k of a weight, of which nothing but its tensors is known.

    Raises:
        ValueError: for a tensor that every weight has and this one lacks, or sizes that are not two positive numbers.
    """
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        if name not in tensors:
            raise ValueError(f"{name} must be among the tensors of a quantized layer, got {sorted(tensors)}")
    shape = tensors["weight_shape"]
    if shape.numel() != 2 or int(shape.min()) < 1:
        raise ValueError(f"weight_shape must hold two positive sizes n, k, got {shape.tolist()}")
    n, k = (int(size) for size in shape)
    return n, k


def check(
    tensors: Mapping[str, Tensor], spec: QuantSpec, n: int, k: int, *, activation_order: bool, input_scale: bool
) -> None:
    """Everything that a layer takes for granted of its tensors, before it takes any of them over.

    Args:
        activation_order, input_scale: whether the layer has them, so that their tensors must be there.

    Raises:
        ValueError: naming the tensor, what it must be, and what it is.
    """
    groups = spec.groups(k)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "weight_packed": ((n, spec.words(k)), (torch.int32,)),
        "weight_scale": ((n, groups), _FLOATS),
        "weight_shape": ((2,), (torch.int64,)),
    }
    if not spec.symmetric:
        expected["weight_zero_point"] = ((spec.words(n), groups), (torch.int32,))
    if activation_order:
        expected["weight_g_idx"] = ((k,), (torch.int32,))
    if input_scale:
        expected["weight_input_scale"] = ((k,), _FLOATS)
    for name, (shape, dtypes) in expected.items():
        if name not in tensors:
            raise ValueError(f"{name} must be among the tensors of the layer, got {sorted(tensors)}")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensors["weight_shape"].tolist() != [n, k]:
        raise ValueError(f"weight_shape must be [{n}, {k}], got {tensors['weight_shape'].tolist()}")
    if not bool(torch.isfinite(tensors["weight_scale"]).all()):
        raise ValueError("weight_scale must be finite, got NaN or infinity")
    if activation_order:
        check_group_index(tensors["weight_g_idx"], spec)
    if input_scale:
        vector = tensors["weight_input_scale"]
        if not bool((torch.isfinite(vector) & (vector > 0)).all()):
            raise ValueError("weight_input_scale must be finite and positive, got another value")
