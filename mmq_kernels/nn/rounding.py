"""Whether the packed layers of a model round their inputs to 8 bits."""

from __future__ import annotations

from torch import nn

from mmq_kernels.nn.linear import QuantLinear
from mmq_kernels.ops import checks


def set_activation_bits(model: nn.Module, bits: int) -> int:
    """Set `QuantLinear.activation_bits` of every packed layer in `model`; returns how many there are.

    Raises:
        ValueError: for bits other than 16 and 8.
    """
    checks.activation_bits(bits)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        layer.activation_bits = bits
    return len(layers)
