"""Which device a command runs on."""

from __future__ import annotations

import torch


def chosen_device(asked: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one, or the CPU.

    Raises:
        ValueError: for a name that is no device, or a device that is not there.
    """
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {asked!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    return device
