"""The Triton backend: kernels that Triton compiles where they run, for every shape and every GPU that it knows."""

from mmq_kernels.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
