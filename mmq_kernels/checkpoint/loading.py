"""`load`: a folder or hub name in, a model that runs out; packed layers where the folder holds codes.

A quantized folder is read tensor by tensor into a model without memory, so the peak is the model itself and one
tensor. Everything else goes through `from_pretrained` of its own class, safetensors only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from mmq_kernels.checkpoint.errors import CheckpointError, shortened
from mmq_kernels.checkpoint.folder import CONFIG, GENERATION_CONFIG, read_config
from mmq_kernels.checkpoint.format import KEY, Stored, describe, parse, stored_layers
from mmq_kernels.checkpoint.names import Names
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.checkpoint.skeleton import architecture, build_skeleton, is_derived, places, tied_names
from mmq_kernels.nn import QuantLinear, set_activation_bits
from mmq_kernels.nn.on_disk import ON_DISK

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""Of a model on the hub: weights, configs, tokenizers, chat templates."""


def load(
    folder_or_hub_name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activation_bits: int | None = None,
) -> nn.Module:
    """A model in eval mode, from a folder that `save` wrote, any safetensors folder of transformers, or the hub.

    Args:
        folder_or_hub_name: local folders go first.
        device: where the model is to be.
        dtype: of everything that is not packed (scales keep theirs); default as stored, but fp32 for fp16 models
            on the CPU, where fp16 arithmetic is slow and inexact. With fp16, modules that transformers keeps in fp32
            stay as stored.

        activation_bits: of every packed layer, see `QuantLinear.activation_bits`: 8 is faster on a CPU and less exact.
            Default as stored, which is 16 unless a model with other layers was saved.

    Raises:
        ValueError: for activation_bits other than 16 and 8.
        CheckpointError: for a folder that is no model, and for missing, truncated, unknown or wrongly shaped tensors,
            naming tensor and file. Pickled weights are refused: they are never opened.
    """
    device = torch.device(device)
    path = local_folder(folder_or_hub_name)
    if path is None:
        return _load_plain(str(folder_or_hub_name), device, dtype)
    content = read_config(path)
    if KEY not in content:
        Folder(path)
        return _load_plain(path, device, dtype)
    description = parse(content[KEY], str(path / CONFIG))
    model: Any = build_skeleton(path)
    _fill(model, Folder(path), description.layers, device, chosen_dtype(content.get("dtype"), device, dtype))
    read_generation_config(model, path)
    if activation_bits is not None:
        set_activation_bits(model, activation_bits)
        description = describe(stored_layers(model), description.recipe)
    model.config.quantization_config = description.model_dump()
    return model.to(device)


def read_generation_config(model: Any, path: Path) -> None:
    """Give a model that generates what the folder says about how."""
    if (path / GENERATION_CONFIG).is_file() and getattr(model, "generation_config", None) is not None:
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except Exception as error:  # whatever the class makes of values that it never expected
            message = shortened(str(error) or type(error).__name__)
            raise CheckpointError(f"{path / GENERATION_CONFIG} cannot be read: {message}") from error


def load_processor(folder_or_hub_name: str | Path) -> Any:
    """The processor (or tokenizer) that belongs to a model.

    Raises:
        CheckpointError: where there is none.
    """
    path = local_folder(folder_or_hub_name)
    try:
        return AutoProcessor.from_pretrained(path or str(folder_or_hub_name))
    except (OSError, ValueError, KeyError) as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"{folder_or_hub_name} has no usable processor: {message}") from error


def fetched(folder_or_hub_name: str | Path) -> Path:
    """The folder; what is on the hub is downloaded into its cache first, but for pickled weights.

    Raises:
        CheckpointError: for what is neither there nor to be had.
    """
    path = local_folder(folder_or_hub_name)
    if path is None:
        try:
            path = Path(snapshot_download(str(folder_or_hub_name), allow_patterns=FILES))
        except (OSError, ValueError) as error:  # what huggingface_hub raises, and what is below it
            message = shortened(" ".join(str(error).split()))
            raise CheckpointError(f"{folder_or_hub_name} is no folder here, nor to be had: {message}") from error
    return path


def local_folder(folder_or_hub_name: str | Path) -> Path | None:
    """The folder, or None where the argument can only be a hub name.

    Raises:
        CheckpointError: for a path that does not exist, or is a file.
    """
    text = str(folder_or_hub_name)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{text} is a file; give the folder that holds the model's {CONFIG}")
    if isinstance(folder_or_hub_name, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text):
        raise CheckpointError(f"{text} does not exist; give a model folder or a hub name such as owner/name")
    return None


def _load_plain(source: str | Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(source)
        model_class: Any = architecture(config.to_dict(), str(source))
        if hasattr(config, KEY):
            raise CheckpointError(f"{source} is quantized by another tool; give the unquantized model")
        model, info = model_class.from_pretrained(
            source,
            dtype=chosen_dtype(config.dtype, device, dtype) or "auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"{source} could not be loaded: {message}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{source} lacks tensor {missing[0]} ({len(missing)} in all); copy the whole model again")
    return model.eval().to(device)


def chosen_dtype(stored: Any, device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype asked for; None means as stored."""
    if dtype is not None:
        return dtype
    on_cpu_in_half = device.type == "cpu" and str(stored).removeprefix("torch.") == "float16"
    return torch.float32 if on_cpu_in_half else None


def _fill(
    model: nn.Module, folder: Folder, layers: dict[str, Stored], device: torch.device, dtype: torch.dtype | None
) -> None:
    """Put every tensor of `folder` where it belongs, and make sure that nothing is missing or left over."""
    names = Names(model)
    names.rename(folder)
    left = set(folder)
    for name, stored in layers.items():
        used = _swap_in(model, names.layer(name) or name, stored, folder, device, dtype)
        left -= used
    wanted = places(model)
    aliases = tied_names(model)
    for name in (name for name in folder if name in left):
        if name not in wanted:
            if is_derived(model, name):
                continue
            raise CheckpointError(f"{folder.files[name]} holds tensor {name}, which the model has no place for")
        tensor = folder.read(name)
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{folder.files[name]}: tensor {name} must have shape {list(wanted[name].shape)}, "
                f"got {list(tensor.shape)}"
            )
        place(model, name, tensor.to(device, target_dtype(model, name, tensor.dtype, dtype)))
    for name, kept in aliases.items():
        if name not in folder.entries:
            place(model, name, _get(model, kept))
        elif kept not in folder.entries:
            place(model, kept, _get(model, name))
        elif torch.equal(_get(model, name), _get(model, kept)):
            place(model, name, _get(model, kept))
    empty = [name for name, tensor in _everything(model) if tensor.device.type == "meta"]
    if empty:
        raise CheckpointError(f"{folder.path} lacks tensor {empty[0]} ({len(empty)} in all); copy the folder again")


def _swap_in(
    model: nn.Module,
    name: str,
    stored: Stored,
    folder: Folder,
    device: torch.device,
    dtype: torch.dtype | None,
) -> set[str]:
    """Replace one linear by its packed self; returns the names of the tensors it took."""
    where = folder.path / CONFIG
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"{where}: {KEY} names layer {name}, which the model lacks") from None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"{where}: {KEY} names {name}, which is no linear but a {type(linear).__name__}")
    optional = {
        "weight_zero_point": not stored.spec.symmetric,
        "weight_g_idx": stored.activation_order,
        "weight_input_scale": stored.input_scale,
        "bias": linear.bias is not None,
    }
    names = [own for own in (*ON_DISK, "bias") if optional.get(own, True)]
    for own in names:
        if f"{name}.{own}" not in folder.entries:
            raise CheckpointError(f"{folder.path} lacks tensor {name}.{own}; copy the folder again")
    tensors = {own: folder.read(f"{name}.{own}") for own in names}
    file = folder.files[f"{name}.weight_packed"]
    shape = [linear.out_features, linear.in_features]
    if tensors["weight_shape"].tolist() != shape:
        got = tensors["weight_shape"].tolist()
        raise CheckpointError(f"{file}: {name}.weight_shape must be {shape}, got {got}")
    if "bias" in tensors:
        if list(tensors["bias"].shape) != shape[:1]:
            raise CheckpointError(f"{file}: {name}.bias must have shape {shape[:1]}, got {list(tensors['bias'].shape)}")
        tensors["bias"] = tensors["bias"].to(target_dtype(model, name, tensors["bias"].dtype, dtype))
    try:
        packed = QuantLinear.from_tensors(
            {own: tensor.to(device) for own, tensor in tensors.items()},
            stored.spec,
            dtype=target_dtype(model, name, stored.dtype, dtype),
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: layer {name}: {error}") from None
    packed.activation_bits = stored.activation_bits
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, packed.eval())
    return {f"{name}.{own}" for own in names}


def target_dtype(model: nn.Module, name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """What a stored tensor becomes: floats follow `dtype`, but for those that transformers keeps in fp32."""
    if dtype is None or not stored.is_floating_point:
        return stored
    kept: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    stays = dtype == torch.float16 and any(part in name.split(".") for part in kept)
    return stored if stays else dtype


def _get(model: nn.Module, name: str) -> Tensor:
    parent, _, own = name.rpartition(".")
    return getattr(model.get_submodule(parent), own)


def place(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Make a tensor the parameter or buffer of that name; gives what it has become."""
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    if own in module._buffers:
        module._buffers[own] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[own] = tensor
    else:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    return getattr(module, own)


def _everything(model: nn.Module) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return named
