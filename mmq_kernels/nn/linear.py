"""`QuantLinear`: a linear layer whose weight exists only as packed codes.

It holds one runtime layout at a time (made for the backend that serves its device); `state_dict` shows and accepts
the on-disk tensors of DESIGN 4.1, so a checkpoint does not depend on the machine that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmq_kernels import backends, ops
from mmq_kernels.backends import ACTIVATIONS, PackedWeight, RuntimeWeight
from mmq_kernels.nn.layouts import blank, layout_for, moved, packed_of, reordered, runtime_of
from mmq_kernels.nn.on_disk import ON_DISK, check, stored_shape
from mmq_kernels.nn.order import group_index, stored_order
from mmq_kernels.ops import checks
from mmq_kernels.ops.choice import select
from mmq_kernels.spec import QuantSpec

_RUNTIME = ("weight_runtime", "scale_runtime", "zero_runtime", "perm")
_OF_NUMBERS = {"spec", "out_features", "in_features", "layout", "activation", "pinned", "_activation_bits"}


class QuantLinear(nn.Module):
    """``y = activation((x / input_scale) @ W^T + bias)`` with ``W = scale * (q - zero)`` kept packed.

    Built by `from_codes`, or empty (all codes zero) to be filled by `load_state_dict`.

    Args:
        in_features, out_features: k and n of ``W [n, k]``; any sizes.
        spec: bits, group size, symmetry.
        bias: whether a bias ``[n]`` is added.
        activation: epilogue fused into the kernel; see `mmq_kernels.backends.ACTIVATIONS`.
        activation_order: whether columns are grouped by a `g_idx` instead of by position.
        input_scale: whether x is divided by a stored vector ``[k]`` (AWQ scales that nothing could absorb).
        dtype: of the bias, and what the layer says its weight's dtype is.
        scale_dtype: of the stored scales.

    Raises:
        ValueError: naming the argument, its requirement and the value got.
    """

    weight_runtime: Tensor
    scale_runtime: Tensor
    zero_runtime: Tensor | None
    perm: Tensor | None
    weight_input_scale: Tensor | None
    bias: nn.Parameter | None
    _like: Tensor
    pinned: str = ""
    """What was assigned to `backend`; "" where the choice is free."""
    _activation_bits: int = 16
    _numbers: tuple[int | str, ...]
    """Of a product, for `ops.product`: they follow the attributes they are made of."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = True,
        activation: str = "none",
        activation_order: bool = False,
        input_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.activation, self.activation_order = activation, activation_order
        device = torch.device(device) if device is not None else torch.get_default_device()
        self.layout = layout_for(device, spec, in_features)
        shapes = backends.backend_of_layout(self.layout).runtime_shapes(spec, out_features, in_features)
        scale = torch.ones(in_features, dtype=dtype, device=device) if input_scale else None
        self.register_buffer("weight_input_scale", scale, persistent=False)
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._set_runtime(
            RuntimeWeight(
                torch.zeros(shapes.weight, dtype=torch.int32, device=device),
                torch.zeros(shapes.scale, dtype=scale_dtype, device=device),
                None if spec.symmetric else torch.zeros(shapes.zero, dtype=torch.int32, device=device),
            ),
            torch.arange(in_features, dtype=torch.int32, device=device) if activation_order else None,
        )
        values = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        spec: QuantSpec,
        *,
        bias: Tensor | None = None,
        g_idx: Tensor | None = None,
        input_scale: Tensor | None = None,
        activation: str = "none",
        dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """A layer from its codes.

        Args:
            codes: uint8 ``[n, k]``, columns in input order.
            scale: ``[n, groups]``; its dtype is kept.
            zero: uint8 ``[n, groups]``; ignored (may be None) when `spec` is symmetric.
            bias: ``[n]``.
            g_idx: int32 ``[k]``, the group of each column (activation order).
            input_scale: ``[k]``.
            dtype: see the class; default the bias' dtype, else the scale's.
        """
        zero_words = None
        if not spec.symmetric:
            if zero is None:
                raise ValueError("zero must be given for an asymmetric weight, got None")
            zero_words = ops.pack(zero.t().contiguous(), spec.bits).t().contiguous()
        n, k = codes.shape
        tensors = {
            "weight_packed": ops.pack(codes, spec.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([n, k]),
        }
        optional = {
            "weight_zero_point": zero_words,
            "weight_g_idx": g_idx,
            "weight_input_scale": input_scale,
            "bias": bias,
        }
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        return cls.from_tensors(tensors, spec, activation=activation, dtype=dtype)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        spec: QuantSpec,
        *,
        activation: str = "none",
        dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """A layer from its on-disk tensors (DESIGN 4.1) and optionally "bias".

        Raises:
            ValueError: for a missing or malformed tensor, naming it.
        """
        n, k = stored_shape(tensors)
        bias = tensors.get("bias")
        scale = tensors["weight_scale"]
        layer = cls(
            k,
            n,
            spec,
            bias=bias is not None,
            activation=activation,
            activation_order="weight_g_idx" in tensors,
            input_scale="weight_input_scale" in tensors,
            device="meta",
            dtype=dtype or (bias if bias is not None else scale).dtype,
            scale_dtype=scale.dtype,
        )
        layer._accept(tensors)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(layer.dtype), requires_grad=False)
        layer._like = torch.empty(0, dtype=layer.dtype, device=scale.device)
        return layer

    # --- what the layer is ------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.weight_runtime.device

    @property
    def dtype(self) -> torch.dtype:
        """What the dtype of the weight would be, were it dense; follows `.to(dtype)`."""
        return self._like.dtype

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight as a tensor without data (device "meta"): there is no dense weight.

        Model code that looks at ``layer.weight.dtype`` keeps working; use `dequantize` for values.
        """
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    @property
    def backend(self) -> str:
        """Name of the backend that serves this layer now.

        Assigned to, it pins the layer: ``layer.backend = "triton"`` (or "cuda/dense" and the like, for one kernel of
        a backend) brings the weight into that backend's layout, and from then on it serves every call, or raises why
        it cannot, whatever `use_backend` says. None or "" gives the choice back. A pin is no part of the state_dict.

        Raises:
            ValueError: for an unknown name.
            RuntimeError: for a backend that cannot be used on the layer's device; the layer is then as it was.
        """
        return select(
            "gemm",
            self.device,
            spec=self.spec,
            dtype=self.dtype,
            layout=self.layout,
            forced=self.pinned or None,
            activation_bits=self.activation_bits,
        ).backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        name = name or ""
        checks.backend(name)
        self._bring_into(layout_for(self.device, self.spec, self.in_features, name))
        self.pinned = name

    @property
    def activation_bits(self) -> int:
        """16: inputs are multiplied as they are. 8: each token is rounded to integers, see `mmq_kernels.ops.gemm`.

        Assigned to; 8 is faster and less exact, and runs on the CPU only: on another device calls raise. Checkpoints
        keep it, the state_dict does not.

        Raises:
            ValueError: for another number.
        """
        return self._activation_bits

    @activation_bits.setter
    def activation_bits(self, bits: int) -> None:
        checks.activation_bits(bits)
        self._activation_bits = bits

    @property
    def packed_bytes(self) -> int:
        """Bytes held for the weight: words, scales, zero points, column order and input scale (not the bias)."""
        held = [getattr(self, name) for name in (*_RUNTIME, "weight_input_scale")]
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.spec.bits}, "
            f"group_size={self.spec.group_size}, symmetric={self.spec.symmetric}, bias={self.bias is not None}, "
            f"activation={self.activation}, layout={self.layout}"
            + (f", activation_bits={self.activation_bits}" if self.activation_bits != 16 else "")
        )

    # --- what it computes -------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., k]`` in fp16, bf16 or fp32 -> ``[..., n]`` in the same dtype (autocast's, where it is on)."""
        held: dict[str, Any] = self._buffers  # faster than by attribute, for which a module looks in three places
        return ops.product(
            x,
            held["weight_runtime"],
            held["scale_runtime"],
            held["zero_runtime"],
            held["perm"],
            held["weight_input_scale"],
            self._parameters["bias"],
            self._numbers,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _OF_NUMBERS and "layout" in self.__dict__:  # which is the last that comes to be
            spec, n, k = self._sizes()
            chosen = (self.layout, self.activation, self.pinned, self._activation_bits)
            self._numbers = (spec.bits, spec.group_size, n, k, *chosen)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``scale * (q - zero)``, ``[n, k]``, columns in input order, without the input scale."""
        return ops.dequantize(
            *(self._runtime()),
            self.perm,
            self.spec.bits,
            self.spec.group_size,
            self.out_features,
            self.in_features,
            self.layout,
            dtype,
        )

    # --- layouts ----------------------------------------------------------------------------------------------------

    def prepack(self, backend: str | None = None) -> QuantLinear:
        """Bring the weight into the layout of `backend` (default: the one pinned, or chosen for the layer's device).

        Raises:
            ValueError: for an unknown backend.
            RuntimeError: for one that cannot be used on this device.
        """
        self._bring_into(layout_for(self.device, self.spec, self.in_features, backend or self.pinned))
        return self

    def on_disk(self) -> dict[str, Tensor]:
        """The tensors of this weight as a checkpoint holds them (DESIGN 4.1), bias not included."""
        packed = self._packed()
        tensors = {"weight_packed": packed.words, "weight_scale": packed.scale}
        if packed.zero is not None:
            tensors["weight_zero_point"] = packed.zero
        tensors["weight_shape"] = torch.tensor([self.out_features, self.in_features])
        if self.perm is not None:
            tensors["weight_packed"] = reordered(packed.words, torch.argsort(self.perm), self.spec, self.in_features)
            tensors["weight_g_idx"] = group_index(self.perm, self.spec)
        if self.weight_input_scale is not None:
            tensors["weight_input_scale"] = self.weight_input_scale
        return tensors

    def _sizes(self) -> tuple[QuantSpec, int, int]:
        return self.spec, self.out_features, self.in_features

    def _layout_for(self, device: torch.device) -> str:
        return layout_for(device, self.spec, self.in_features, self.pinned)

    def _runtime(self) -> RuntimeWeight:
        return RuntimeWeight(self.weight_runtime, self.scale_runtime, self.zero_runtime)

    def _set_runtime(self, runtime: RuntimeWeight, perm: Tensor | None) -> None:
        for name, tensor in zip(_RUNTIME, (*runtime, perm), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        # torch.export finds buffers by their place among all, and forgets those that are None: they come last.
        for name in [name for name, tensor in self._buffers.items() if tensor is None]:
            self._buffers[name] = self._buffers.pop(name)

    def _packed(self) -> PackedWeight:
        """The on-disk tensors, columns in stored order."""
        return packed_of(self._runtime(), self.layout, *self._sizes())

    def _set_packed(self, packed: PackedWeight, perm: Tensor | None, layout: str) -> None:
        self.layout = layout
        self._set_runtime(runtime_of(packed, layout, *self._sizes()), perm)

    def _bring_into(self, layout: str) -> None:
        if layout != self.layout:
            self._set_packed(self._packed(), self.perm, layout)

    def _accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over on-disk tensors, checking each."""
        held_scale = self.weight_input_scale is not None
        check(
            tensors,
            self.spec,
            self.out_features,
            self.in_features,
            activation_order=self.activation_order,
            input_scale=held_scale,
        )
        words, perm = tensors["weight_packed"], None
        if self.activation_order:
            perm = stored_order(tensors["weight_g_idx"])
            words = reordered(words, perm, self.spec, self.in_features)
        if held_scale:
            self.weight_input_scale = tensors["weight_input_scale"]
        zero = None if self.spec.symmetric else tensors["weight_zero_point"]
        packed = PackedWeight(words, tensors["weight_scale"], zero)
        self._set_packed(packed, perm, self._layout_for(words.device))

    # --- torch's machinery ------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """`.to()` and friends: devices change the layout; a change of dtype leaves codes, scales and zeros alone."""
        runtime, perm, layout, target = self._runtime(), self.perm, self.layout, fn(self._like).device
        stays = target == runtime.weight.device
        new_layout = layout if stays else self._layout_for(target)  # may refuse: before anything has moved
        for name in _RUNTIME:
            self._buffers.pop(name)
        super()._apply(fn, recurse)
        self.layout, there = new_layout, moved(perm, fn)
        if not stays and "meta" in (target.type, runtime.weight.device.type):
            self._set_runtime(blank(runtime, new_layout, *self._sizes(), target), there)
        elif new_layout == layout:
            self._set_runtime(RuntimeWeight(*(moved(t, fn) for t in runtime)), there)  # type: ignore[arg-type]
        else:
            packed = packed_of(runtime, layout, *self._sizes())
            packed = PackedWeight(*(None if t is None else t.to(target) for t in packed))  # type: ignore[arg-type]
            self._set_packed(packed, there, new_layout)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name, tensor in self.on_disk().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {name: state_dict[prefix + name] for name in ON_DISK if prefix + name in state_dict}
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in ours}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if "weight_packed" not in ours:
            missing_keys.append(prefix + "weight_packed")
            return
        try:
            device = self.device
            self._accept({name: t if device.type == "meta" else t.to(device) for name, t in ours.items()})
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies carry the on-disk tensors: the runtime layout belongs to the machine."""
        state = self.__dict__.copy()
        state["_buffers"] = {name: t for name, t in self._buffers.items() if name not in _RUNTIME}
        state["_packed_state"] = (tuple(self._packed()), self.perm)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed, perm = state.pop("_packed_state")
        super().__setstate__(state)
        self._set_packed(PackedWeight(*packed), perm, self._layout_for(packed[0].device))
