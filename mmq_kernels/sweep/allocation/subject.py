"""The model that bits are allocated to: loaded anew for every candidate, quantized, weighed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from mmq_kernels.checkpoint import CheckpointError, load, load_processor
from mmq_kernels.checkpoint.folder import read_config
from mmq_kernels.checkpoint.format import KEY
from mmq_kernels.checkpoint.loading import fetched
from mmq_kernels.eval import ModelSize, model_size
from mmq_kernels.models import component_prefixes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A model's folder, and how what is left alone counts.

    Attributes:
        folder: of the unquantized model.
        device: where it runs.
        dtype: that it is loaded in; None as `mmq_kernels.checkpoint.load` decides.
        float_bits: that a weight counts which is left alone: of `dtype`, or else as the folder stores it, whatever
            the device computes in.
    """

    folder: Path
    device: torch.device
    dtype: torch.dtype | None
    float_bits: int

    @classmethod
    def of(cls, source: str | Path, device: torch.device | str = "cpu", dtype: str | None = None) -> Subject:
        """From a folder or hub name.

        Args:
            dtype: fp32, fp16 or bf16; None for what the folder has.

        Raises:
            CheckpointError: for what is no model, or quantized already.
            ValueError: for another dtype.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        folder = fetched(source)
        content = read_config(folder)
        if KEY in content:
            raise CheckpointError(f"{folder} is quantized already; give the unquantized model")
        asked = DTYPES[dtype] if dtype is not None else None
        stored = content.get("dtype", content.get("torch_dtype")) or "float32"
        counted = asked if asked is not None else getattr(torch, str(stored).removeprefix("torch."), torch.float32)
        return cls(folder, torch.device(device), asked, torch.finfo(counted).bits)

    def load(self) -> Any:
        """The float model; without a bar for each of the many times."""
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            return load(self.folder, device=self.device, dtype=self.dtype)
        finally:
            if shown:
                logging.enable_progress_bar()

    def processor(self) -> Any:
        """What belongs to it."""
        return load_processor(self.folder)

    def size(self, model: nn.Module) -> ModelSize:
        """What a model weighs, with `float_bits` for what is left alone."""
        return model_size(model, component_prefixes(model), float_bits=self.float_bits)
