"""What `config.json` says about a quantized model: which layers hold codes, and how each is stored.

::

    "quantization_config": {
        "quant_method": "mmq", "format_version": 1, "package_version": "0.1.0", "recipe": "language=rtn:4:g128",
        "checksum": 2889440387, "groups": [{"bits": 4, "group_size": 128, "symmetric": false, "activation_order": false,
                    "input_scale": false, "dtype": "float32", "layers": ["language_model.lm_head", ...]}]
    }

The tensors of each layer are those of DESIGN 4.1, under the layer's name; everything else in the folder is what
transformers writes.
"""

from __future__ import annotations

import json
import zlib
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from torch import nn

from mmq_kernels import __version__
from mmq_kernels.checkpoint.errors import CheckpointError, shortened
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

METHOD: Final = "mmq"
FORMAT_VERSION: Final = 1
KEY = "quantization_config"
"""Where config.json holds the description."""


class Stored(NamedTuple):
    """How one layer is stored: the spec, the dtype its weight had, which optional tensors it has, and what its inputs
    are multiplied as.
    """

    spec: QuantSpec
    dtype: torch.dtype
    activation_order: bool = False
    input_scale: bool = False
    activation_bits: int = 16


class Group(BaseModel):
    """Layers that are stored alike."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: int
    group_size: int
    symmetric: bool
    activation_order: bool = False
    input_scale: bool = False
    activation_bits: Literal[16, 8] = 16
    dtype: Literal["float16", "bfloat16", "float32"]
    layers: list[str]

    @model_validator(mode="after")
    def _valid(self) -> Group:
        QuantSpec(self.bits, self.group_size, self.symmetric)
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Files without rounded activations are as they were before there were any."""
        content = dump(self)
        if self.activation_bits == 16:
            del content["activation_bits"]
        return content

    @property
    def stored(self) -> Stored:
        spec = QuantSpec(self.bits, self.group_size, self.symmetric)
        return Stored(spec, getattr(torch, self.dtype), self.activation_order, self.input_scale, self.activation_bits)


class Description(BaseModel):
    """The whole `quantization_config`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    quant_method: Literal["mmq"] = METHOD
    format_version: Literal[1] = FORMAT_VERSION
    package_version: str = __version__
    recipe: str = ""
    groups: list[Group]
    checksum: int | None = None

    @property
    def sum_of_groups(self) -> int:
        """CRC-32 of the groups: a wrong bit width or group size can fit the tensors all the same."""
        groups = [group.model_dump() for group in self.groups]
        return zlib.crc32(json.dumps(groups, sort_keys=True).encode())

    @model_validator(mode="after")
    def _each_layer_once(self) -> Description:
        seen: set[str] = set()
        for group in self.groups:
            for name in group.layers:
                if name in seen:
                    raise ValueError(f"layer {name} must be in one group, got it in two")
                seen.add(name)
        return self

    @model_validator(mode="after")
    def _as_written(self) -> Description:
        if self.checksum is not None and self.checksum != self.sum_of_groups:
            raise ValueError(f"checksum must be that of the groups, {self.sum_of_groups}, got {self.checksum}")
        return self

    @property
    def layers(self) -> dict[str, Stored]:
        """How each quantized layer is stored, by name."""
        return {name: group.stored for group in self.groups for name in group.layers}


def describe(layers: dict[str, Stored], recipe: str = "") -> Description:
    """The description of a model whose quantized layers are stored as `layers` says."""
    names: dict[Stored, list[str]] = {}
    for name, stored in layers.items():
        names.setdefault(stored, []).append(name)
    groups = [
        Group(
            bits=stored.spec.bits,
            group_size=stored.spec.group_size,
            symmetric=stored.spec.symmetric,
            activation_order=stored.activation_order,
            input_scale=stored.input_scale,
            activation_bits=stored.activation_bits,  # type: ignore[arg-type]
            dtype=str(stored.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            layers=alike,
        )
        for stored, alike in names.items()
    ]
    described = Description(recipe=recipe, groups=groups)
    return described.model_copy(update={"checksum": described.sum_of_groups})


def stored_layers(model: nn.Module) -> dict[str, Stored]:
    """How each `QuantLinear` of `model` is stored, by name.

    Raises:
        CheckpointError: for a layer with a fused activation, which a checkpoint cannot express.
    """
    found: dict[str, Stored] = {}
    for name, module in model.named_modules():
        found |= stored_layer(name, module)
    return found


def stored_layer(name: str, module: nn.Module) -> dict[str, Stored]:
    """The same for one module; nothing for another one than a `QuantLinear`."""
    if not isinstance(module, QuantLinear):
        return {}
    if module.activation != "none":
        raise CheckpointError(
            f"activation must be 'none' in a layer to be saved, got {module.activation!r} (layer {name})"
        )
    scaled = module.weight_input_scale is not None
    return {name: Stored(module.spec, module.dtype, module.activation_order, scaled, module.activation_bits)}


def parse(content: Any, where: str) -> Description:
    """The description in `content`, the value of config.json's `quantization_config`.

    Args:
        where: what to call it in an error, usually the path of config.json.

    Raises:
        CheckpointError: for another method, an unknown version, or a malformed field, naming it.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: {KEY} must be an object, got {type(content).__name__}")
    method = content.get("quant_method")
    if method != METHOD:
        raise CheckpointError(
            f"{where}: {KEY}.quant_method must be {METHOD!r}, got {method!r}; "
            "mmq import turns GPTQ, AWQ and compressed-tensors folders into it"
        )
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: {KEY}.format_version must be {FORMAT_VERSION}, got {shortened(repr(version))}; "
            "install the mmq_kernels that wrote this folder"
        )
    try:
        return Description.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (KEY, *first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "value_error" else f", got {shortened(repr(first.get('input')))}"
        raise CheckpointError(f"{where}: {place}: {message[0].lower()}{message[1:]}{got}") from None
