"""The module that replaces `torch.nn.Linear`."""

from mmq_kernels.nn.linear import QuantLinear

__all__ = ["QuantLinear"]
