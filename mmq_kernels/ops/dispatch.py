"""Whether torch's dispatcher has anything to do for a call but pass it on.

Its way from Python to Python takes longer than all that a product does before its kernel runs. So a call that nothing
looks at, no gradient, mode, transform, tracer or profiler, goes to the implementation itself; what is left out then is
what the dispatcher would have found nothing to do for.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Keys, _Key = torch._C.DispatchKeySet, torch._C.DispatchKey
_DEVICES = (_Key.CPU, _Key.CUDA)
_PASSING = (_Key.AutogradCPU, _Key.AutogradCUDA, _Key.ADInplaceOrView, _Key.BackendSelect)
"""Keys with nothing to do: gradients are off, and the others are for ops that write to tensors, or get none."""


def straight(x: Tensor) -> bool:
    """Whether a product of x meets nothing on its way; never where gradients are on."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(x) is not Tensor
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ) and _straight(
        torch._C._dispatch_keys(x).raw_repr(),
        torch._C._dispatch_tls_local_include_set().raw_repr(),
        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
    )


def autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast, where that is on; it is off where `straight`."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


@lru_cache(maxsize=64)
def _straight(own: int, included: int, excluded: int) -> bool:
    """Whether the first kernel that does anything is the CPU's or CUDA's, of the three sets that torch looks at."""
    keys = (_Keys.from_raw_repr(own) | _Keys.from_raw_repr(included)) - _Keys.from_raw_repr(excluded)
    for key in _PASSING:
        keys = keys.remove(key)
    return keys.highestPriorityTypeId() in _DEVICES
