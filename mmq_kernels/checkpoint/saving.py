"""`save`: a model, packed layers and all, into a folder that `load` turns back into the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels.checkpoint.folder import check_target, write_config, write_processor, written_beside
from mmq_kernels.checkpoint.format import describe, stored_layers
from mmq_kernels.checkpoint.shards import ShardWriter
from mmq_kernels.checkpoint.skeleton import tied_names
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize.recipe import Recipe

SHARD_BYTES = 5_000_000_000


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    recipe: str | Recipe = "",
    processor: Any = None,
    source: str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a transformers model, quantized or not.

    The folder appears whole or not at all: everything is written into a hidden folder beside it, which is renamed
    at the end and removed on any error. A tied tensor is written once.

    Args:
        model: with `QuantLinear`s in place of some linears.
        folder: does not exist, or is empty.
        recipe: what was done, for the record in config.json.
        processor: saved along; or
        source: a folder or hub name whose processor files are taken over.
        max_shard_bytes: of tensor data in one file.

    Returns:
        The folder.

    Raises:
        CheckpointError: for a folder that is not empty, or where writing fails; one line with the remedy.
    """
    path = check_target(folder)
    description = describe(stored_layers(model), str(recipe))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with written_beside(path) as temporary:
        writer = ShardWriter(temporary, max_shard_bytes)
        for name, tensor in tensors_of(model):
            writer.add(name, tensor)
        writer.close()
        write_config(temporary, model, str(dtype).removeprefix("torch."), description)
        write_processor(temporary, processor, source)
    return path


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint of `model`, module by module, each tied one once.

    Packed layers are brought into their on-disk layout one at a time, as they are asked for.
    """
    aliases = tied_names(model)
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        own = dict(module._parameters)
        own |= {n: t for n, t in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in own.items():
            if tensor is not None and start + name not in aliases:
                yield start + name, tensor
        if isinstance(module, QuantLinear):
            for name, tensor in module.on_disk().items():
                yield start + name, tensor
