"""A model larger than memory: what lies outside its blocks is there, and of the blocks the one that is worked on.

A block's tensors are read from the source folder whenever it is held or called, and let go of afterwards; those of a
block that is finished come from where finished blocks are kept. So quantizers, which go block by block, run as on a
model in memory, and the peak is one block and what is done to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.loading import place, target_dtype
from mmq_kernels.checkpoint.names import Names
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.checkpoint.skeleton import build_skeleton, is_derived, places, tied_names
from mmq_kernels.models.families import blocks_of, family_of
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize.sequential import Finished, install


class Unfit(CheckpointError):
    """The model cannot be streamed from its folder."""


class Streamed:
    """The model of an unquantized folder, block by block.

    Args:
        path: the folder.
        device: where its tensors are to be while they are there.
        dtype: of floating-point tensors; None as stored.

    Attributes:
        model: runs as if it were all there.
        folder: the source; tensors under their names in the model.
        finished: gives what a block has become, or None; to be assigned before anything is held.

    Raises:
        Unfit: where the folder holds tensors that the model has in another form, or blocks share tensors.
        CheckpointError: for a folder that is damaged.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype | None) -> None:
        self.model, self.folder = build_skeleton(path), Folder(path)
        self.finished: Callable[[str], Finished | None] = lambda block: None
        self._device, self._dtype = device, dtype
        Names(self.model).rename(self.folder)
        self._homes = _homes(self.model, self.folder)
        self._blocks = {name for part in blocks_of(self.model, family_of(self.model)) for name in part.names}
        self._empty = {name: self._inside(name) for name in sorted(self._blocks)}
        self._held: Counter[str] = Counter()
        inside = {name for own in self._empty.values() for name in own}
        for name, home in self._homes.items():
            if home != name and (name in inside or home in inside):
                raise Unfit(f"{path}: {name} and {home} are one tensor, of which one is in a block")
        self._read(name for name in places(self.model) if name not in inside)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        for block in self._blocks:
            module = self.model.get_submodule(block)
            module.forward = self._holding(block, module)  # type: ignore[method-assign]

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """The tensors of a block, or of anything else that is there anyway, are in memory for a while."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave(name)

    def _holding(self, block: str, module: nn.Module) -> Callable[..., Any]:
        run = module.forward

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.hold(block):
                now = self.model.get_submodule(block)  # a linear that is a block of its own may be packed by now
                return run(*args, **kwargs) if now is module else now(*args, **kwargs)

        return forward

    def _enter(self, block: str) -> None:
        self._held[block] += 1
        if block not in self._blocks or self._held[block] > 1:
            return
        self._read(self._empty[block])
        finished = self.finished(block)
        if finished is not None:
            install(self.model, *finished)

    def _leave(self, block: str) -> None:
        self._held[block] -= 1
        if block not in self._blocks or self._held[block]:
            return
        for name, (linear, empty) in self._empty[block].items():
            layer, _, _ = name.rpartition(".")
            if linear is not None and isinstance(self.model.get_submodule(layer), QuantLinear):
                self.model.set_submodule(layer, linear)
            place(self.model, name, empty)

    def _inside(self, block: str) -> dict[str, tuple[nn.Linear | None, Tensor]]:
        """Of each tensor of a block the linear that it belongs to, if any, and the tensor without memory."""
        found: dict[str, tuple[nn.Linear | None, Tensor]] = {}
        for inner, module in self.model.get_submodule(block).named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                name = ".".join(part for part in (block, inner, own) if part)
                # Models ask a layer that they have yet to call for its dtype.
                empty = place(self.model, name, torch.empty_like(parameter, dtype=self._dtype_of(name)))
                found[name] = (module if isinstance(module, nn.Linear) else None, empty)
        return found

    def _dtype_of(self, name: str) -> torch.dtype:
        home = self._homes[name]
        return target_dtype(self.model, home, self.folder.entries[home].dtype, self._dtype)

    def _read(self, names: Iterator[str] | dict[str, Any]) -> None:
        """Fill tensors; a tied one is read once."""
        there: dict[str, Tensor] = {}
        for name in names:
            home = self._homes[name]
            if home not in there:
                tensor = self.folder.read(home)
                there[home] = place(self.model, name, tensor.to(self._device, self._dtype_of(name)))
            else:
                place(self.model, name, there[home])


def _homes(model: nn.Module, folder: Folder) -> dict[str, str]:
    """Under which name the folder holds each tensor of the model.

    Raises:
        CheckpointError: for a tensor that has no place in the model, that the folder lacks, or of another shape.
    """
    wanted, aliases = places(model), tied_names(model)
    for name in folder:
        if name not in wanted and not is_derived(model, name):
            raise Unfit(f"{folder.files[name]} holds tensor {name}, which the model has no place for")
    same: dict[str, list[str]] = {}
    for name in wanted:
        same.setdefault(aliases.get(name, name), []).append(name)
    homes: dict[str, str] = {}
    for kept, names in same.items():
        held = [name for name in (kept, *names) if name in folder.entries]
        if not held:
            raise CheckpointError(f"{folder.path} lacks tensor {kept}; copy the folder again")
        for name in held:
            shape, got = tuple(wanted[name].shape), folder.entries[name].shape
            if shape != got:
                raise CheckpointError(
                    f"{folder.files[name]}: tensor {name} must have shape {list(shape)}, got {list(got)}"
                )
        first = folder.read(held[0]) if len(held) > 1 else None
        for name in names:
            # A folder may hold both of two tied tensors, and even different ones.
            alone = first is not None and name in held and not torch.equal(folder.read(name), first)
            homes[name] = name if alone else held[0]
    return homes
