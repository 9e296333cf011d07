"""A quantized layer on its way from one format to another: the words of DESIGN 4.1 are the common language.

GPTQ's words are ours transposed, compressed-tensors' are ours, and AWQ's hold the same codes in another order: a
layer is never dequantized on its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.format import Stored
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.nn.on_disk import ON_DISK, check
from mmq_kernels.nn.order import check_group_index
from mmq_kernels.spec import QuantSpec

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Layer:
    """A layer of one of our own folders; its tensors are read when they are asked for.

    Attributes:
        name: in the model.
        stored: what config.json says of it.
        n, k: out_features and in_features.
        folder: where its tensors are.
    """

    name: str
    stored: Stored
    n: int
    k: int
    folder: Folder

    @property
    def spec(self) -> QuantSpec:
        return self.stored.spec

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of DESIGN 4.1, without the bias.

        Raises:
            CheckpointError: for a missing or malformed one, naming it.
        """
        optional = {
            "weight_zero_point": not self.spec.symmetric,
            "weight_g_idx": self.stored.activation_order,
            "weight_input_scale": self.stored.input_scale,
        }
        found = {own: self.read(own) for own in ON_DISK if optional.get(own, True)}
        order, scaled = self.stored.activation_order, self.stored.input_scale
        try:
            check(found, self.spec, self.n, self.k, activation_order=order, input_scale=scaled)
        except ValueError as error:
            raise CheckpointError(f"{self.folder.path}: layer {self.name}: {error}") from None
        return found

    def read(self, own: str) -> Tensor:
        """One tensor, under its name in the layer."""
        name = f"{self.name}.{own}"
        if name not in self.folder.entries:
            raise CheckpointError(f"{self.folder.path} lacks tensor {name}; copy the folder again")
        return self.folder.read(name)

    def zero(self) -> Tensor:
        """Zero points uint8 ``[n, groups]``, the middle code where they are not stored."""
        if self.spec.symmetric:
            return torch.full((self.n, self.spec.groups(self.k)), self.spec.middle_code, dtype=torch.uint8)
        return unpack_zero(self.read("weight_zero_point"), self.spec.bits, self.n)


@dataclass(frozen=True)
class Incoming:
    """A layer of another tool's folder: what it is, and which tensors it is made of.

    Attributes:
        spec: bits and groups; symmetric only where the format says so and does not store zero points.
        n, k: out_features and in_features.
        tensors: names of its tensors in the folder, the bias not among them.
    """

    spec: QuantSpec
    n: int
    k: int
    tensors: tuple[str, ...]


def pack_zero(zero: Tensor, bits: int) -> Tensor:
    """Zero points uint8 ``[n, groups]`` -> `weight_zero_point`, int32 ``[ceil(n*bits/32), groups]``."""
    return ops.pack(zero.t().contiguous(), bits).t().contiguous()


def unpack_zero(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_zero`."""
    return ops.unpack(words.t().contiguous(), bits, n).t().contiguous()


def even_groups(spec: QuantSpec, k: int) -> Tensor:
    """int32 ``[k]``: the group of each column where groups are runs of columns."""
    return torch.arange(k, dtype=torch.int32) // spec.group_length(k)


def exact_in(dtype: torch.dtype, scale: Tensor) -> bool:
    """Whether another dtype can hold scales exactly."""
    return torch.equal(scale.to(dtype).float(), scale.float())


def scales_like(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of a model of `dtype`: those of bf16 models are kept in bf16 where that is exact, as we write them."""
    return scale.to(dtype) if dtype == torch.bfloat16 and exact_in(dtype, scale) else scale


def on_disk(
    words: Tensor, scale: Tensor, zero: Tensor | None, g_idx: Tensor | None, spec: QuantSpec, n: int, k: int
) -> dict[str, Tensor]:
    """The tensors of DESIGN 4.1, checked.

    Args:
        words: `weight_packed`, int32 ``[n, ceil(k*bits/32)]``.
        scale: ``[n, groups]``.
        zero: uint8 ``[n, groups]``; None where `spec` is symmetric.
        g_idx: int32 ``[k]``; dropped where it says nothing.

    Raises:
        ValueError: for values that no weight can have.
    """
    tensors = {"weight_packed": words.contiguous(), "weight_scale": scale.contiguous()}
    if zero is not None and not spec.symmetric:
        tensors["weight_zero_point"] = pack_zero(zero, spec.bits)
    tensors["weight_shape"] = torch.tensor([n, k])
    if g_idx is not None and not torch.equal(g_idx, even_groups(spec, k)):
        check_group_index(g_idx, spec)
        tensors["weight_g_idx"] = g_idx
    ordered = "weight_g_idx" in tensors
    check(tensors, spec, n, k, activation_order=ordered, input_scale=False)
    return tensors


def names_of(folder: Folder, own: str) -> list[str]:
    """The modules of a folder that have a tensor `own`, in the folder's order."""
    return [name.removesuffix(f".{own}") for name in folder if name.endswith(f".{own}")]


def expect(folder: Folder, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Make sure that a tensor is there and what it must be; any float where no dtype is given.

    Raises:
        CheckpointError: naming file, tensor, what it must be and what it is.
    """
    if name not in folder.entries:
        raise CheckpointError(f"{folder.path} lacks tensor {name}; copy the folder again")
    entry = folder.entries[name]
    if entry.shape != shape:
        raise CheckpointError(
            f"{folder.files[name]}: tensor {name} must have shape {list(shape)}, got {list(entry.shape)}"
        )
    if entry.dtype not in (dtypes or _FLOATS):
        wanted = " or ".join(map(str, dtypes or _FLOATS))
        raise CheckpointError(f"{folder.files[name]}: tensor {name} must be {wanted}, got {entry.dtype}")


def spec_of(where: Path | str, name: str, bits: object, group_size: object, symmetric: bool) -> QuantSpec:
    """A spec from a foreign config.

    Raises:
        CheckpointError: for one that this package lacks, naming config and layer.
    """
    try:
        return QuantSpec(bits, group_size, symmetric)  # type: ignore[arg-type]
    except ValueError as error:
        raise CheckpointError(f"{where}: layer {name}: {error}") from None
