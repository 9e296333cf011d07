"""Whether torch's dispatcher has anything to do for a call but pass it on.

Its way from Python to Python takes longer than all that a product does before its kernel runs. So a call that nothing
looks at, no gradient, mode, transform, tracer or profiler, goes to the implementation itself; what is left out then is
what the dispatcher would have found nothing to do for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_kernels import _native


def straight(x: Tensor) -> bool:
    """Whether a product of x meets nothing on its way; never where gradients are on, or without the extension."""
    return not torch.compiler.is_compiling() and _native.available() and _native.module().straight(x)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast, where that is on; it is off where `straight`."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
