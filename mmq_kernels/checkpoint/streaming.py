"""`quantize_folder`: from one folder to another, a tensor at a time, for models larger than memory.

Only round-to-nearest methods can do that: they look at nothing but the weight itself.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.folder import (
    check_target,
    disk_bytes,
    read_config,
    write_config,
    write_processor,
    written_beside,
)
from mmq_kernels.checkpoint.format import KEY, Stored, describe
from mmq_kernels.checkpoint.names import Names
from mmq_kernels.checkpoint.shards import Folder, ShardWriter
from mmq_kernels.checkpoint.skeleton import build_skeleton, is_derived, places, tied_names
from mmq_kernels.models.plan import LayerPlan, make_plan
from mmq_kernels.models.tied import untie_heads
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize.recipe import Recipe
from mmq_kernels.quantize.rtn import quantize_weight
from mmq_kernels.quantize.sequential import LayerReport, Progress

SHARD_BYTES = 500_000_000
"""Of one output file; it is held in memory until it is full."""

METHODS = frozenset({"rtn", "uniform"})

UNTIED = "untied from the embedding, which keeps its weights"


class _Output(NamedTuple):
    """A tensor of the new folder, and the layer that it is the quantized weight of, if any."""

    name: str
    layer: LayerPlan | None


def quantize_folder(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | str,
    *,
    progress: Progress | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Quantize the model in folder `source` into folder `out` without ever holding it.

    The result is bit for bit what loading, quantizing and saving would give (floats as stored). The peak of memory
    is one tensor with its fp32 copy and twice one output file.

    Args:
        source: a folder of safetensors.
        out: does not exist, or is empty; appears whole or not at all.
        recipe: rtn and uniform rules only.
        progress: told (bytes done, bytes in all, name of the tensor).
        max_shard_bytes: of an output file.

    Returns:
        ``{"recipe", "layers": [one LayerReport each], "left_alone": {name: reason}, "ignored": [tensors of the source
        that the model computes itself], "source_bytes", "disk_bytes", "seconds"}``.

    Raises:
        CheckpointError: for a source that is no model, damaged or of other names; for a target that cannot be written.
        ValueError: for a recipe that needs data, or that does not fit the model.
    """
    start = time.perf_counter()
    recipe = Recipe.parse(recipe)
    unfit = sorted(recipe.methods - METHODS)
    if unfit:
        raise ValueError(f"method must be rtn or uniform to stream from folder to folder, got {unfit[0]!r}")
    target, source = check_target(out), Path(source).expanduser()
    config = read_config(source)
    if KEY in config:
        raise CheckpointError(f"{source} is quantized already; give the unquantized model")
    folder = Folder(source)
    model = build_skeleton(source)
    Names(model).rename(folder)
    plan = make_plan(model, recipe)
    aliases = tied_names(model)
    untied = untie_heads(model, plan.layers)
    outputs, ignored = _outputs(model, folder, plan.layers, aliases, set(untied))
    stored: dict[str, Stored] = {}
    with written_beside(target) as temporary:
        writer = ShardWriter(temporary, max_shard_bytes)
        done, total = 0, sum(folder.entries[name].bytes for name in outputs)
        for name, products in outputs.items():
            tensor = folder.read(name)
            for product in products:
                if product.layer is None:
                    writer.add(product.name, tensor)
                    continue
                for own, part in _quantized(tensor, product.layer, folder.files[name]).items():
                    writer.add(f"{product.layer.name}.{own}", part)
                stored[product.layer.name] = Stored(product.layer.spec, tensor.dtype)
            done += folder.entries[name].bytes
            del tensor
            if progress:
                progress(done, total, name)
        writer.close()
        ordered = {name: stored[name] for name in plan.layers}
        write_config(temporary, model, dtype_name(config, folder), describe(ordered, str(recipe)))
        write_processor(temporary, source=source)
    return {
        "recipe": str(recipe),
        "layers": [_report(layer, layer.name in untied).to_json() for layer in plan.layers.values()],
        "left_alone": plan.left_alone,
        "ignored": ignored,
        "source_bytes": disk_bytes(source),
        "disk_bytes": disk_bytes(target),
        "seconds": time.perf_counter() - start,
    }


def _outputs(
    model: nn.Module,
    folder: Folder,
    layers: dict[str, LayerPlan],
    aliases: dict[str, str],
    untied: set[str],
) -> tuple[dict[str, list[_Output]], list[str]]:
    """What each tensor of the source becomes, in the order of the source; and what is left out because computed.

    Args:
        aliases: names of tied tensors and where they live, before untying.
        untied: layers that are to be quantized and were tied.

    Raises:
        CheckpointError: for a tensor that fits nowhere, or a parameter that the source lacks.
    """
    wanted = places(model)
    outputs: dict[str, list[_Output]] = {}
    ignored: list[str] = []
    for name in folder:
        if name not in wanted:
            if not is_derived(model, name):
                raise CheckpointError(
                    f"{folder.files[name]} holds tensor {name}, which the model has no place for; "
                    "load the folder with transformers and save it again"
                )
            ignored.append(name)
            continue
        shape = tuple(wanted[name].shape)
        if folder.entries[name].shape != shape:
            got = list(folder.entries[name].shape)
            raise CheckpointError(f"{folder.files[name]}: tensor {name} must have shape {list(shape)}, got {got}")
        kept = aliases.get(name)
        tied = kept is not None and name.rpartition(".")[0] not in untied
        if tied and kept in folder.entries and torch.equal(folder.read(name), folder.read(str(kept))):
            continue
        outputs[name] = [_output(name, layers)]
    for name in wanted:
        if name in outputs or name in folder.entries:
            continue
        home = _home(name, aliases, folder)
        if home is None:
            raise CheckpointError(f"{folder.path} lacks tensor {name}; copy the folder again")
        product = _output(name, layers)
        if product.layer is not None:
            outputs[home].append(product)
    return outputs, ignored


def _output(name: str, layers: dict[str, LayerPlan]) -> _Output:
    module, _, own = name.rpartition(".")
    return _Output(name, layers.get(module) if own == "weight" else None)


def _home(name: str, aliases: dict[str, str], folder: Folder) -> str | None:
    """Under which name the source holds a tied tensor; None where it does not."""
    kept = aliases.get(name, name)
    for other in (kept, *(alias for alias, main in aliases.items() if main == kept)):
        if other in folder.entries:
            return other
    return None


def _quantized(weight: Tensor, layer: LayerPlan, file: Path) -> dict[str, Tensor]:
    """The on-disk tensors of one weight."""
    try:
        found = quantize_weight(weight, layer.spec, per_tensor=layer.per_tensor)
    except ValueError as error:
        raise CheckpointError(f"{file}: layer {layer.name}: {error}") from None
    return QuantLinear.from_codes(*found[:3], layer.spec, dtype=weight.dtype).on_disk()


def _report(layer: LayerPlan, untied: bool) -> LayerReport:
    spec, note = layer.spec, UNTIED if untied else ""
    return LayerReport(
        layer.name, spec.bits, spec.group_size, spec.symmetric, asked=layer.method, used=layer.method, note=note
    )


def dtype_name(config: dict[str, Any], folder: Folder) -> str:
    """The dtype that config.json says, under its name in transformers 5 or 4, or the first tensor's."""
    named = config.get("dtype") or config.get("torch_dtype")
    floats = (entry.dtype for entry in folder.entries.values() if entry.dtype.is_floating_point)
    return str(named or next(floats, torch.float32)).removeprefix("torch.")
