"""What a choice costs in time: each linear timed alone, at the rows that it really sees.

A budget in milliseconds is for one pass of the model over one sample (an image with its text, batch 1), or, with
`tokens`, for one call of the language model on so many tokens: 1 is a step of decoding. The time of a model is

    ms = rest + sum over layers, over their calls, of ms(layer, choice, rows)

where rest is what the float model takes beside its linears. What is timed are eager calls, the host's share included,
as a model makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels.nn import QuantLinear
from mmq_kernels.sweep.allocation.measurements import Measurements
from mmq_kernels.sweep.allocation.units import Choice, Unit, linear_of, named

Timer = Callable[[Mapping[str, Callable[[int], object]], float, torch.device], Mapping[str, Mapping[str, float]]]
"""Microseconds of calls by name (``us``), measured for so many seconds: `mmq_kernels.bench.timing.timed`."""

SECONDS = 0.15
"""That each layer is timed for."""

CACHE = 64 * 2**20
"""Bytes of weights that copies of a layer fill, or of the model if it is smaller: a layer finds of its weight in a
cache what it would find there in the model."""

MOST_COPIES = 32


class Latency:
    """Milliseconds of a model on a device.

    Args:
        model: the float model.
        batch: a call of the model on one sample.
        tokens: None for that call; else each layer of the language model is called once, with so many.
        timer: takes the times.
        kept: what is in it is not timed again.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        batch: Mapping[str, Any],
        *,
        tokens: int | None,
        timer: Timer,
        kept: Measurements,
    ) -> None:
        self._model, self._timer, self._kept = model, timer, kept
        self._device = next(model.parameters()).device
        self._batch, self._tokens = batch, tokens
        self._bytes = sum(parameter.nbytes for parameter in model.parameters())
        if tokens is None:
            self._rows = _rows_seen(model, units, batch)
        else:
            self._rows = {
                layer: [tokens] if unit.component == "language" else [] for unit in units for layer in unit.layers
            }
        self.rest = self._rest(units) if tokens is None else 0.0

    def unit(self, unit: Unit, choice: Choice) -> float:
        """Milliseconds of a unit's layers, stored like that."""
        return sum(
            self._layer(linear_of(self._model, name), choice, rows) for name in unit.layers for rows in self._rows[name]
        )

    @property
    def what(self) -> str:
        """What the milliseconds are of."""
        return "a pass over one sample" if self._tokens is None else f"{self._tokens} tokens through the language model"

    def measured(self, model: nn.Module) -> dict[str, float]:
        """What a whole model really takes; nothing for `tokens`, of which only the linears are known."""
        return {} if self._tokens is not None else {"measured_ms": self.whole(model)}

    def whole(self, model: nn.Module) -> float:
        """Milliseconds of a pass of a model over the sample."""

        def call(_: int) -> object:
            return model(**_on(self._device, self._batch))

        model.eval()
        return self._timer({"": call}, 1.0, self._device)[""]["us"] / 1e3

    def _rest(self, units: Sequence[Unit]) -> float:
        whole = self._kept.once(lambda: self.whole(self._model), measured="time of the float model")
        return max(0.0, whole - sum(self.unit(unit, None) for unit in units))

    def _layer(self, linear: nn.Linear, choice: Choice, rows: int) -> float:
        n, k, bias = linear.out_features, linear.in_features, linear.bias is not None
        dtype = linear.weight.dtype

        def timed() -> float:
            def made() -> nn.Module:
                common: dict[str, Any] = {"bias": bias, "device": self._device, "dtype": dtype}
                return nn.Linear(k, n, **common) if choice is None else QuantLinear(k, n, choice, **common)

            first = made()
            held = sum(t.nbytes for t in (*first.parameters(), *first.buffers()))
            copies = min(MOST_COPIES, max(1, min(CACHE, self._bytes) // max(1, held)))
            layers = [first, *(made() for _ in range(copies - 1))]
            x = torch.randn(rows, k, device=self._device).to(dtype)
            with torch.no_grad():
                times = self._timer({"": lambda i: layers[i % len(layers)](x)}, SECONDS, self._device)
            return times[""]["us"] / 1e3

        return self._kept.once(
            timed, measured="time of a layer", n=n, k=k, bias=bias, dtype=str(dtype), choice=named(choice), rows=rows
        )


def check_tokens(tokens: int | None, units: Sequence[Unit]) -> None:
    """Raises ValueError where there is no language model for tokens to go through."""
    if tokens is not None and not any(unit.component == "language" for unit in units):
        raise ValueError(f"tokens ({tokens}) are those of a language model, and none of its layers get bits here")


@torch.no_grad()
def _rows_seen(model: nn.Module, units: Sequence[Unit], batch: Mapping[str, Any]) -> dict[str, list[int]]:
    """For each layer the rows of each of its calls."""
    rows: dict[str, list[int]] = {layer: [] for unit in units for layer in unit.layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            rows[name].append(x.numel() // x.shape[-1])

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in rows]
    try:
        model(**_on(next(model.parameters()).device, batch))
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
