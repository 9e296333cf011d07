"""Where configurations are measured: in this process, or on Ray."""

from mmq_kernels.sweep.engines.local import Local

__all__ = ["Local"]
