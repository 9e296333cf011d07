"""What a model really weighs: bits per weight of the whole model, and bytes held in memory.

``bpw = bits held by floating-point tensors and packed layers / weights of the unquantized model``: packed
words, scales, zero points, biases, norms, embeddings and layers left alone all count; tied tensors count
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from mmq_kernels.nn import QuantLinear


@dataclass(frozen=True)
class ModelSize:
    """Size of a model or of one of its components.

    Attributes:
        weights: scalars that the unquantized model has.
        weight_bits: bits that stand for them now.
        memory_bytes: bytes of all parameters and buffers as held, tables of positions and the like included.
        components: the same for each component that was named.
    """

    weights: int
    weight_bits: int
    memory_bytes: int
    components: dict[str, ModelSize] = field(default_factory=dict)

    @property
    def bpw(self) -> float:
        """Bits per weight, with overhead."""
        return self.weight_bits / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, `bpw` among them."""
        parts = {name: part.to_json() for name, part in self.components.items()}
        return {**asdict(self), "bpw": self.bpw, "components": parts}


def model_size(
    model: nn.Module,
    components: Mapping[str, Iterable[str]] | None = None,
    *,
    float_bits: int | None = None,
) -> ModelSize:
    """The size of `model`.

    Args:
        components: for each component's name the prefixes of its modules' names
            (``{"vision": ["vision_model"]}``).
        float_bits: bits that an unquantized weight counts for; None counts it as held. With 16, a model held
            in float32 for lack of fast half precision says what its half-precision checkpoint weighs.
    """
    parts = {name: _measure(model, tuple(prefixes), float_bits) for name, prefixes in (components or {}).items()}
    whole = _measure(model, ("",), float_bits)
    return ModelSize(whole.weights, whole.weight_bits, whole.memory_bytes, parts)


def _measure(model: nn.Module, prefixes: tuple[str, ...], float_bits: int | None) -> ModelSize:
    weights = bits = memory = 0
    weighed: set[object] = set()
    held: set[object] = set()
    for module_name, module in model.named_modules():
        packed = isinstance(module, QuantLinear)
        if packed and any(_inside(module_name, prefix) for prefix in prefixes):
            weights += module.in_features * module.out_features
        for own_name, tensor in _own_tensors(module):
            name = f"{module_name}.{own_name}".lstrip(".")
            if not any(_inside(name, prefix) for prefix in prefixes):
                continue
            storage = _storage(tensor)
            if storage not in held:
                held.add(storage)
                memory += tensor.untyped_storage().nbytes()
            if (storage, tensor.storage_offset(), tensor.shape) in weighed:
                continue
            weighed.add((storage, tensor.storage_offset(), tensor.shape))
            as_held = tensor.element_size() * 8
            if packed and own_name != "bias":
                bits += tensor.numel() * as_held
            elif tensor.is_floating_point():
                weights += tensor.numel()
                bits += tensor.numel() * (float_bits or as_held)
    return ModelSize(weights, bits, memory)


def _inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _storage(tensor: Tensor) -> object:
    """What identifies the memory under `tensor`; a tensor without memory (meta, empty) is itself."""
    address = tensor.untyped_storage().data_ptr()
    return (tensor.device, address) if address else id(tensor)
