"""Packed 2..8-bit weights for vision-language models: kernels, quantizers and their evaluation."""

from mmq_kernels.nn import QuantLinear
from mmq_kernels.ops import use_backend
from mmq_kernels.spec import QuantSpec

__version__ = "0.1.0"

__all__ = ["QuantLinear", "QuantSpec", "__version__", "use_backend"]
