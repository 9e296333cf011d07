"""The module that replaces `torch.nn.Linear`, and modules without memory."""

from mmq_kernels.nn.linear import QuantLinear
from mmq_kernels.nn.meta import parameters_on_meta
from mmq_kernels.nn.rounding import set_activation_bits

__all__ = ["QuantLinear", "parameters_on_meta", "set_activation_bits"]
