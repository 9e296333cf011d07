"""Bits for every block of a model under a budget: measured, solved exactly, and checked on whole quantized models."""

from mmq_kernels.sweep.allocation.allocate import AllocationOptions, allocate
from mmq_kernels.sweep.allocation.budget import Budget, BudgetError

__all__ = ["AllocationOptions", "Budget", "BudgetError", "allocate"]
