"""`save`: a model, packed layers and all, into a folder that `load` turns back into the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels.checkpoint.folder import check_target, write_config, write_processor, written_beside
from mmq_kernels.checkpoint.format import Stored, describe, stored_layer
from mmq_kernels.checkpoint.shards import ShardWriter
from mmq_kernels.checkpoint.skeleton import tied_names
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize.recipe import Recipe
from mmq_kernels.quantize.sequential import Hold, in_memory

SHARD_BYTES = 5_000_000_000


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    recipe: str | Recipe = "",
    processor: Any = None,
    source: str | Path | None = None,
    hold: Hold = in_memory,
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
        hold: brings a block's tensors in, for a model that is not all in memory.
        max_shard_bytes: of tensor data in one file.

    Returns:
        The folder.

    Raises:
        CheckpointError: for a folder that is not empty, or where writing fails; one line with the remedy.
    """
    path = check_target(folder)
    aliases = tied_names(model)
    stored: dict[str, Stored] = {}
    with written_beside(path) as temporary:
        writer = ShardWriter(temporary, max_shard_bytes)
        dtype: torch.dtype | None = None
        for prefix, module in _modules(model, hold):
            stored |= stored_layer(prefix, module)
            for name, tensor in _tensors(prefix, module):
                if name in aliases:
                    continue
                if dtype is None and tensor.is_floating_point():
                    dtype = tensor.dtype
                writer.add(name, tensor)
        writer.close()
        named = str(dtype or torch.float32).removeprefix("torch.")
        write_config(temporary, model, named, describe(stored, str(recipe)))
        write_processor(temporary, processor, source)
    return path


def _modules(model: nn.Module, hold: Hold, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module, each while it is held."""
    with hold(prefix):
        module = model.get_submodule(prefix)
        yield prefix, module
        for child in module._modules:
            if module._modules[child] is not None:
                yield from _modules(model, hold, f"{prefix}.{child}" if prefix else child)


def _tensors(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors as a checkpoint names them; a packed layer is brought into its on-disk layout."""
    start = f"{prefix}." if prefix else ""
    own: dict[str, Tensor | None] = dict(module._parameters)
    own |= {n: t for n, t in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for name, tensor in own.items():
        if tensor is not None:
            yield start + name, tensor
    if isinstance(module, QuantLinear):
        for name, tensor in module.on_disk().items():
            yield start + name, tensor
