"""What export and import share: the linears of the model, and writing a folder while another one is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.folder import CONFIG, GENERATION_CONFIG, write_processor
from mmq_kernels.checkpoint.format import KEY
from mmq_kernels.checkpoint.shards import Folder, ShardWriter
from mmq_kernels.quantize.sequential import Progress

T = TypeVar("T")


def linear_of(model: nn.Module, name: str, folder: Folder) -> nn.Linear:
    """The linear that a quantized layer stands for.

    Raises:
        CheckpointError: where the model has none of that name.
    """
    try:
        found = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"{folder.path} holds a quantized layer {name}, which the model lacks") from None
    if not isinstance(found, nn.Linear):
        raise CheckpointError(f"{folder.path}: layer {name} must be a linear, got a {type(found).__name__}")
    return found


def linear_names(model: nn.Module) -> list[str]:
    """Every `nn.Linear` of a model."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def in_model_order(layers: Mapping[str, T], model: nn.Module) -> dict[str, T]:
    """The same, in the order in which the model has its modules, so that settings do not depend on the files."""
    place = {name: i for i, name in enumerate(linear_names(model))}
    return dict(sorted(layers.items(), key=lambda pair: place.get(pair[0], len(place))))


def rewrite(
    folder: Folder,
    owners: Mapping[str, str],
    convert: Callable[[str], Mapping[str, Tensor]],
    writer: ShardWriter,
    progress: Progress | None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Copy every tensor of `folder`, but for those of its quantized layers, which are converted one at a time.

    Args:
        owners: the layer of each tensor that belongs to one; "" for tensors to leave out.
        convert: from a layer's name to its new tensors, by their names.
        progress: told (layers done, layers in all, name of the layer).
        names: new ones of tensors that are copied; default as they are.
    """
    done: set[str] = set()
    total = len({owner for owner in owners.values() if owner})
    for name in folder:
        owner = owners.get(name)
        if owner is None:
            writer.add(names[name] if names else name, folder.read(name))
        elif owner and owner not in done:
            for new, tensor in convert(owner).items():
                writer.add(new, tensor)
            done.add(owner)
            if progress:
                progress(len(done), total, owner)


def write_files(
    target: Path, source: Path, content: Mapping[str, Any], settings: Mapping[str, Any], side_file: str | None
) -> None:
    """Everything but the weights: config.json with other settings, and what `source` has of a processor.

    Args:
        content: of config.json in `source`.
        side_file: where the settings are to be written as well.
    """
    written = {CONFIG: {**content, KEY: dict(settings)}}
    if side_file:
        written[side_file] = dict(settings)
    for name, values in written.items():
        (target / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    if (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, target / GENERATION_CONFIG)
    write_processor(target, source=source)
