"""`export_folder`: one of our folders in, a folder of another format out, a layer at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.exchange.folders import in_model_order, linear_names, linear_of, rewrite, write_files
from mmq_kernels.checkpoint.exchange.formats import FORMATS, Format
from mmq_kernels.checkpoint.exchange.layers import Layer
from mmq_kernels.checkpoint.folder import CONFIG, check_target, disk_bytes, read_config, written_beside
from mmq_kernels.checkpoint.format import KEY, Stored, parse
from mmq_kernels.checkpoint.shards import Folder, ShardWriter
from mmq_kernels.checkpoint.skeleton import build_skeleton
from mmq_kernels.checkpoint.streaming import SHARD_BYTES
from mmq_kernels.nn.on_disk import ON_DISK
from mmq_kernels.quantize.sequential import Progress

_SHOWN = 3
"""Names of layers that an error lists for each reason."""


def export_folder(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    progress: Progress | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the quantized model in folder `source` in another format, codes, scales and zero points unchanged.

    Tensors keep their names, but for those of quantized weights. The peak of memory is one layer and one output file.

    Args:
        source: a folder that `save` or `mmq quantize` wrote.
        target: does not exist, or is empty; appears whole or not at all.
        format: compressed-tensors, gptq, gptq_v2 or awq.
        progress: told (layers done, layers in all, name of the layer).
        max_shard_bytes: of an output file.

    Returns:
        ``{"format", "layers": how many, "caution": readers known to fail, or "", "source_bytes", "disk_bytes",
        "seconds"}``.

    Raises:
        CheckpointError: for a source that is not ours or damaged, a target that cannot be written, and, before
            anything is written, for layers that the format cannot carry, naming them, why, and the formats that can.
        ValueError: for an unknown format.
    """
    start = time.perf_counter()
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    chosen, target, source = FORMATS[format], check_target(target), Path(source).expanduser()
    content = read_config(source)
    if KEY not in content:
        raise CheckpointError(f"{source} is not quantized; quantize it first (mmq quantize)")
    stored = parse(content[KEY], str(source / CONFIG)).layers
    folder, model = Folder(source), build_skeleton(source)
    layers = in_model_order({name: _layer(name, how, model, folder) for name, how in stored.items()}, model)
    left = [name for name in linear_names(model) if name not in layers]
    _refuse_unfit(chosen, list(layers.values()), left, source)
    settings = chosen.settings(list(layers.values()), left)
    owners = {f"{name}.{own}": name for name in layers for own in ON_DISK}
    with written_beside(target) as temporary:
        writer = ShardWriter(temporary, max_shard_bytes)
        rewrite(folder, owners, lambda name: _encoded(chosen, layers[name]), writer, progress)
        writer.close()
        write_files(temporary, source, content, settings, chosen.side_file)
    return {
        "format": format,
        "layers": len(layers),
        "caution": chosen.caution(list(layers.values())),
        "source_bytes": disk_bytes(source),
        "disk_bytes": disk_bytes(target),
        "seconds": time.perf_counter() - start,
    }


def _encoded(chosen: Format, layer: Layer) -> dict[str, Tensor]:
    return {f"{layer.name}.{own}": tensor for own, tensor in chosen.encode(layer).items()}


def _layer(name: str, stored: Stored, model: nn.Module, folder: Folder) -> Layer:
    linear = linear_of(model, name, folder)
    return Layer(name, stored, linear.out_features, linear.in_features, folder)


def _refuse_unfit(chosen: Format, layers: Sequence[Layer], left: Sequence[str], source: Path) -> None:
    """Raise where the format cannot carry all layers, and say which formats can."""
    reasons = _reasons(chosen, layers, left)
    if not reasons:
        return
    able = [other.name for other in FORMATS.values() if not _reasons(other, layers, left)]
    remedy = f"{', '.join(able)} can" if able else "no other format here can either"
    raise CheckpointError(f"{chosen.name} cannot carry {source}: {'; '.join(reasons)}. For all of it, {remedy}")


def _reasons(chosen: Format, layers: Sequence[Layer], left: Sequence[str]) -> list[str]:
    """Why a format cannot carry layers, each reason with their names."""
    alike: dict[str, list[str]] = {}
    for layer in layers:
        reason = chosen.why_not(layer)
        if reason:
            alike.setdefault(reason, []).append(layer.name)
    if alike:
        return [f"{_listed(names)}: {reason}" for reason, names in alike.items()]
    together = chosen.why_not_together(layers, left)
    return [together] if together else []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
