"""The formats that layers can be exported to and imported from, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.exchange.awq import Awq
from mmq_kernels.checkpoint.exchange.compressed_tensors import CompressedTensors
from mmq_kernels.checkpoint.exchange.gptq import Gptq
from mmq_kernels.checkpoint.exchange.layers import Incoming, Layer
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.spec import QuantSpec


class Format(Protocol):
    """What one format can say, and how it says it."""

    name: str
    """On the command line."""

    method: str
    """`quant_method` in config.json."""

    side_file: str | None
    """A file beside config.json that holds the same settings, or None."""

    def why_not(self, layer: Layer) -> str:
        """Why the format cannot carry a layer; "" where it can."""

    def why_not_together(self, layers: Sequence[Layer], left: Sequence[str]) -> str:
        """Why it cannot carry layers in one file, of which it can carry each; "" where it can.

        Args:
            left: names of the linears that are not quantized.
        """

    def caution(self, layers: Sequence[Layer]) -> str:
        """Which readers of the format fail on layers that it can carry; "" where none is known."""

    def encode(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer, without the bias, by their names in the layer."""

    def settings(self, layers: Sequence[Layer], left: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of a model."""

    def find(self, settings: Mapping[str, Any], folder: Folder, where: str) -> dict[str, Incoming]:
        """The quantized layers of a folder, all their tensors' shapes and dtypes checked.

        Raises:
            CheckpointError: for settings or tensors that are not understood, naming them.
        """

    def decode(
        self, name: str, layer: Incoming, settings: Mapping[str, Any], folder: Folder, dtype: torch.dtype
    ) -> tuple[QuantSpec, dict[str, Tensor]]:
        """The tensors of DESIGN 4.1 of one of them, and its spec.

        Args:
            dtype: of the model.

        Raises:
            ValueError: for values that no weight can have.
        """


FORMATS: dict[str, Format] = {
    known.name: known for known in (CompressedTensors(), Gptq("gptq"), Gptq("gptq_v2"), Awq())
}
"""By name."""


def format_of(settings: Mapping[str, Any], where: str) -> Format:
    """The format of a folder, by its settings.

    Raises:
        CheckpointError: where none of ours reads it, naming method and remedy.
    """
    method = settings.get("quant_method")
    known = [candidate for candidate in FORMATS.values() if candidate.method == method]
    if not known:
        methods = ", ".join(sorted({candidate.method for candidate in FORMATS.values()}))
        raise CheckpointError(f"{where}: quant_method must be one of {methods} to be imported, got {method!r}")
    return known[0]
