"""Activation order: which group each input column belongs to, and the order in which columns are stored.

GPTQ with activation order groups columns by importance, not by position: ``g_idx [k]`` names the group of each
column. In memory the columns are sorted by group, so that kernels see ordinary groups; `perm [k]` says which input
column each stored column is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels.spec import QuantSpec


def check_group_index(g_idx: Tensor, spec: QuantSpec) -> None:
    """Each group must have exactly its share of the columns.

    Raises:
        ValueError: for an index out of range or a group with another number of columns.
    """
    k = g_idx.numel()
    groups, length = spec.groups(k), spec.group_length(k)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise ValueError(f"weight_g_idx must be between 0 and {groups - 1}, got {low if low < 0 else high}")
    counts = torch.bincount(g_idx.long(), minlength=groups).tolist()
    for group, count in enumerate(counts):
        wanted = min(length, k - group * length)
        if count != wanted:
            raise ValueError(f"weight_g_idx must name group {group} {wanted} times, got {count}")


def stored_order(g_idx: Tensor) -> Tensor:
    """``g_idx`` int32 ``[k]`` -> perm int32 ``[k]``: columns sorted by group, input order within a group."""
    return torch.argsort(g_idx, stable=True).to(torch.int32)


def group_index(perm: Tensor, spec: QuantSpec) -> Tensor:
    """The inverse: the group of each input column."""
    k = perm.numel()
    groups = torch.arange(k, dtype=torch.int32, device=perm.device) // spec.group_length(k)
    return torch.empty_like(perm).index_copy_(0, perm.long(), groups.to(torch.int32))
