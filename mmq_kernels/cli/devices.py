"""Which device a command runs on, and how much memory it took."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

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


def peak_bytes() -> int:
    """Most resident memory that this process ever had."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of a process that was forked, this counts its parent's
    return peak if sys.platform == "darwin" else peak * 1024
