"""`import_folder`: a folder of another tool's format in, one of ours out, a layer at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.exchange.folders import in_model_order, linear_of, rewrite, write_files
from mmq_kernels.checkpoint.exchange.formats import FORMATS, format_of
from mmq_kernels.checkpoint.exchange.layers import Incoming
from mmq_kernels.checkpoint.exchange.renaming import names_in_model
from mmq_kernels.checkpoint.folder import CONFIG, check_target, disk_bytes, read_config, written_beside
from mmq_kernels.checkpoint.format import KEY, METHOD, Stored, describe
from mmq_kernels.checkpoint.shards import Folder, ShardWriter
from mmq_kernels.checkpoint.skeleton import build_skeleton, is_derived, places
from mmq_kernels.checkpoint.streaming import SHARD_BYTES, dtype_name
from mmq_kernels.quantize.sequential import Progress

_AWQ_SIDE_FILE = "quant_config.json"
"""Where AutoAWQ once kept its settings."""


def import_folder(
    source: str | Path,
    target: str | Path,
    *,
    progress: Progress | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Turn the quantized model in folder `source` into one that `load` runs: codes, scales and zero points unchanged.

    Tensors get the names that the model's class gives them now, which public folders may not have. The peak of memory
    is one layer and one output file.

    Args:
        source: GPTQ v1 or v2, AWQ GEMM or compressed-tensors `pack-quantized`; which one, its config.json (or
            quantize_config.json, quant_config.json) says.
        target: does not exist, or is empty; appears whole or not at all.
        progress: told (layers done, layers in all, name of the layer).
        max_shard_bytes: of an output file.

    Returns:
        ``{"format", "layers": how many, "source_bytes", "disk_bytes", "seconds"}``.

    Raises:
        CheckpointError: for a source that is of no known format, damaged, or names layers that the model lacks; for
            a target that cannot be written.
    """
    start = time.perf_counter()
    target, source = check_target(target), Path(source).expanduser()
    content = read_config(source)
    settings, where = _settings(source, content)
    known = format_of(settings, where)
    folder, model = Folder(source), build_skeleton(source)
    layers = known.find(settings, folder, where)
    if not layers:
        raise CheckpointError(f"{source} holds no layer of {known.method}, of which {where} speaks")
    names = names_in_model(model, folder)
    linears = {name: _linear(name, layer, names, model, folder) for name, layer in layers.items()}
    owners = {tensor: name for name, layer in layers.items() for tensor in layer.tensors}
    owners |= dict.fromkeys(_zero_biases(linears, model, folder), "")
    _refuse_strangers({name: new for name, new in names.items() if name not in owners}, model, folder)
    content = {**content, "dtype": dtype_name(content, folder)}
    stored: dict[str, Stored] = {}

    def convert(name: str) -> Mapping[str, Tensor]:
        bias = folder.entries.get(f"{name}.bias")
        dtype = bias.dtype if bias else getattr(torch, content["dtype"])
        try:
            spec, tensors = known.decode(name, layers[name], settings, folder, dtype)
        except ValueError as error:
            raise CheckpointError(f"{folder.files[layers[name].tensors[0]]}: layer {name}: {error}") from None
        stored[linears[name]] = Stored(spec, dtype, activation_order="weight_g_idx" in tensors)
        return {f"{linears[name]}.{own}": tensor for own, tensor in tensors.items()}

    with written_beside(target) as temporary:
        writer = ShardWriter(temporary, max_shard_bytes)
        rewrite(folder, owners, convert, writer, progress, names)
        writer.close()
        write_files(temporary, source, content, describe(in_model_order(stored, model)).model_dump(), None)
    return {
        "format": known.method,
        "layers": len(layers),
        "source_bytes": disk_bytes(source),
        "disk_bytes": disk_bytes(target),
        "seconds": time.perf_counter() - start,
    }


def _settings(source: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings of the format, and the file that holds them.

    Raises:
        CheckpointError: where there are none, or they are ours.
    """
    if KEY in content:
        settings, where = content[KEY], f"{source / CONFIG}: {KEY}"
    else:
        methods = {known.side_file: known.method for known in FORMATS.values() if known.side_file}
        methods[_AWQ_SIDE_FILE] = "awq"
        side = next((name for name in methods if (source / name).is_file()), None)
        if side is None:
            raise CheckpointError(f"{source} is not quantized: {CONFIG} has no {KEY}; mmq quantize does it")
        where = str(source / side)
        try:
            settings = {"quant_method": methods[side], **json.loads((source / side).read_text())}
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where} is no JSON object ({error}); copy it again") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where} must be an object, got {type(settings).__name__}")
    if settings.get("quant_method") == METHOD:
        raise CheckpointError(f"{source} is in this package's own format already")
    return settings, where


def _linear(name: str, layer: Incoming, names: Mapping[str, str], model: nn.Module, folder: Folder) -> str:
    """What the model calls a layer.

    Raises:
        CheckpointError: where that is no linear of the model, or one of another shape.
    """
    new = names[layer.tensors[0]].rpartition(".")[0]
    linear = linear_of(model, new, folder)
    shape = [linear.out_features, linear.in_features]
    if [layer.n, layer.k] != shape:
        raise CheckpointError(f"{folder.path}: layer {name} must have the shape {shape}, got {[layer.n, layer.k]}")
    return new


def _zero_biases(linears: Mapping[str, str], model: nn.Module, folder: Folder) -> list[str]:
    """Biases that AutoGPTQ gave to layers that have none."""
    biases = [f"{name}.bias" for name, new in linears.items() if model.get_submodule(new).bias is None]
    return [bias for bias in biases if bias in folder.entries and not bool(folder.read(bias).any())]


def _refuse_strangers(names: Mapping[str, str], model: nn.Module, folder: Folder) -> None:
    """Raise for a tensor that the model has no place for."""
    wanted = places(model)
    for name, new in names.items():
        if new not in wanted and not is_derived(model, new):
            raise CheckpointError(f"{folder.files[name]} holds tensor {name}, which the model has no place for")
