"""What `from_pretrained` of transformers needs: places for packed tensors before it loads, packed layers afterwards.

transformers puts each tensor of a file into the buffer of its name. So a linear that the file holds packed becomes a
`StoredLinear`, whose buffers are those tensors, and once it is filled a `QuantLinear`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.format import KEY, Description, Stored
from mmq_kernels.checkpoint.names import Names
from mmq_kernels.checkpoint.shards import INDEX, SINGLE, Folder
from mmq_kernels.nn import QuantLinear
from mmq_kernels.nn.on_disk import ON_DISK


class StoredLinear(nn.Module):
    """The on-disk tensors of a packed layer, without memory until they are loaded.

    Args:
        linear: whose place it takes, and whose bias and dtype it keeps.
        stored: how the layer is stored.
        folder: what is loaded.
        name: of the layer in it.
    """

    def __init__(self, linear: nn.Linear, stored: Stored, folder: Folder, name: str) -> None:
        super().__init__()
        self.stored, self.folder, self.name, self.dtype = stored, folder, name, linear.weight.dtype
        optional = {
            "weight_zero_point": not stored.spec.symmetric,
            "weight_g_idx": stored.activation_order,
            "weight_input_scale": stored.input_scale,
        }
        self.own = [own for own in ON_DISK if optional.get(own, True)]
        for own in self.own:
            entry = folder.entries.get(f"{name}.{own}")
            if entry is None:
                raise CheckpointError(f"{folder.path} lacks tensor {name}.{own}; copy the folder again")
            self.register_buffer(own, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        if linear.bias is not None and f"{name}.bias" not in folder.entries:
            raise CheckpointError(f"{folder.path} lacks tensor {name}.bias; copy the folder again")
        self.sizes = [linear.out_features, linear.in_features]
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """Without memory, and nothing that a model's initialization could fill."""
        return torch.empty(self.sizes, dtype=self.dtype, device="meta")

    def packed(self) -> QuantLinear:
        """The layer, from the tensors loaded.

        Raises:
            CheckpointError: for a tensor that is malformed, or not on a device.
        """
        tensors = {own: self._as_stored(own) for own in self.own}
        shape = tensors["weight_shape"].tolist()
        if shape != self.sizes:
            raise CheckpointError(f"{self.folder.path}: {self.name}.weight_shape must be {self.sizes}, got {shape}")
        if self.bias is not None:
            tensors["bias"] = self.bias.detach()
        try:
            layer = QuantLinear.from_tensors(tensors, self.stored.spec, dtype=self.dtype)
        except ValueError as error:
            raise CheckpointError(f"{self.folder.path}: layer {self.name}: {error}") from None
        layer.activation_bits = self.stored.activation_bits
        return layer

    def _as_stored(self, own: str) -> Tensor:
        tensor = self.get_buffer(own)
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"{self.name} was offloaded; packed layers must be on the device that computes them: give a device_map "
                "without offloading (packed models are small)"
            )
        # transformers 4 casts whatever is floating point to the model's dtype, and none looks at checksums
        entry = self.folder.entries[f"{self.name}.{own}"]
        if tensor.dtype != entry.dtype or entry.checksum is not None:
            return self.folder.read(f"{self.name}.{own}").to(tensor.device)
        return tensor


def prepare(model: Any, description: Description, files: list[str] | None) -> None:
    """Swap the linears that `description` lists for places of their packed tensors.

    Args:
        model: without memory. Layers that it lacks are passed over: it may be a part of the model that was saved.
        files: those to be loaded; found by the model's name where transformers does not tell.

    Raises:
        CheckpointError: where none of the layers is in the model, or a packed tensor is missing; naming it.
    """
    folder, names = Folder(_folder_of(model, files)), Names(model)
    names.rename(folder)
    swapped = 0
    for listed, stored in description.layers.items():
        name = names.layer(listed)
        if name is not None:
            _replace(model, name, StoredLinear(model.get_submodule(name), stored, folder, name))
            swapped += 1
    if description.layers and not swapped:
        raise CheckpointError(
            f"{folder.path}: {type(model).__name__} has none of the layers that {KEY} lists, such as "
            f"{next(iter(description.layers))}"
        )


def finish(model: nn.Module) -> None:
    """Packed layers in place of the filled `StoredLinear`s."""
    for name, module in list(model.named_modules()):
        if isinstance(module, StoredLinear):
            _replace(model, name, module.packed().eval())


def densify(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Plain linears with the values of the packed weights, in `dtype`, default that of each layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            weight: Tensor = module.dequantize()
            if module.weight_input_scale is not None:
                weight /= module.weight_input_scale.float()
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            dense.weight = nn.Parameter(weight.to(dtype or module.dtype), requires_grad=False)
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.detach().to(dtype or module.dtype), requires_grad=False)
            _replace(model, name, dense.eval())


def hooks(model: nn.Module) -> dict[str, Any]:
    """accelerate's hooks by the name of their module; they move inputs between devices."""
    return {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}


def put_back(model: nn.Module, found: dict[str, Any]) -> None:
    """Give modules that were swapped the hooks of those before them."""
    for name, hook in found.items():
        module = model.get_submodule(name)
        if not hasattr(module, "_hf_hook"):
            _hook(module, hook)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    setattr(model.get_submodule(parent), child, module)
    if hook is not None:
        _hook(module, hook)


def _hook(module: nn.Module, hook: Any) -> None:
    from accelerate.hooks import add_hook_to_module

    add_hook_to_module(module, hook)


def _folder_of(model: Any, files: list[str] | None) -> Path:
    """The folder of the files; transformers 4 tells only the name that it was given, and has cached them by now."""
    if files:
        return Path(files[0]).parent
    name, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    for file in (INDEX, SINGLE):
        found = cached_file(name, file, _commit_hash=commit, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return Path(found).parent
    raise CheckpointError(f"{name} has no {SINGLE} and no {INDEX}; load packed models from a folder or the hub")
