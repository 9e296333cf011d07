"""The packed linear against `torch.nn.functional.linear` in the same run.

    y = activation(x @ W^T + bias),  x [m, k], W [n, k], y [m, n]

A row says how long a call took, what that is in TFLOP/s and GB/s, how many times torch's time fits into it, and what
share of the machine's own limit it is: the longer of moving the bytes and of multiplying, both as measured in the run.
All that is compared for a number of tokens takes turns, every width and everybody else's products, and on a CPU memory
is read in the same turns: what a shared machine's memory gives changes from minute to minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import mmq_kernels
from mmq_kernels.bench.layers import pinned, random_layer, twin
from mmq_kernels.bench.peers import Calls, peers
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import Limits, Setting
from mmq_kernels.bench.shapes import Shape
from mmq_kernels.bench.timing import Call, Rotation, host_overhead
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

_EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu": torch.nn.functional.gelu,
}
"""What torch calls behind its linear where the packed layer fuses an activation."""


def moved_bytes(layer: QuantLinear, m: int, dtype: torch.dtype) -> int:
    """Bytes that a call must move: words, scales and zero points (padding included) + bias + x + y."""
    bias = sum(parameter.nbytes for parameter in layer.parameters())
    x, y = m * layer.in_features, m * layer.out_features
    return layer.packed_bytes + bias + (x + y) * dtype.itemsize


def operations(m: int, n: int, k: int) -> int:
    """Multiplications and additions of a product."""
    return 2 * m * n * k


def bench_gemm(
    setting: Setting,
    shapes: Sequence[Shape],
    bits: Sequence[int],
    groups: Sequence[int],
    tokens: Sequence[int],
    *,
    activation: str = "none",
    beside: Sequence[str] = (),
    rounded: bool = False,
    against: bool = False,
) -> Iterator[Row]:
    """A row for each shape, group size, number of tokens and width; the widths take turns.

    Args:
        activation: none, or gelu: a bias is then added and the activation fused, and torch calls it by itself.
        beside: backends ("triton"), or kernels of them ("cuda/dense"), that are timed in the same turns.
        rounded: time the same layers with activations of 8 bits too.
        against: time the packed products of others too (`mmq_kernels.bench.peers`).

    Raises:
        RuntimeError: for a backend that cannot serve here.
    """
    for shape in shapes:
        dense = {name: _dense(setting, shape, dtype) for name, dtype in setting.baselines.items()}
        for group in groups:
            packed = [_packed(setting, shape, QuantSpec(width, group), activation, beside, against) for width in bits]
            for m in tokens:
                yield from _rows(setting, shape, packed, dense, m, rounded)


@dataclass(frozen=True)
class _Packed:
    """Copies of a layer of one width, twins of them that other backends serve, and others' products of that width."""

    layers: list[QuantLinear]
    others: dict[str, list[QuantLinear]]
    rivals: dict[str, Calls]

    @property
    def bits(self) -> int:
        return self.layers[0].spec.bits

    def calls(self, x: Tensor, dtype: torch.dtype, rounded: bool) -> dict[str, Call]:
        """What takes turns, by name; x ``[m, k]`` in fp32."""
        calls: dict[str, Call] = {"packed": _packed_calls(self.layers, x.to(dtype))}
        if rounded:
            calls["a8"] = _packed_calls([_rounded(layer) for layer in self.layers], x.to(dtype))
        calls |= {name: _packed_calls(twins, x.to(dtype)) for name, twins in self.others.items()}
        return calls | {name: made(x) for name, made in self.rivals.items()}


def _dense(setting: Setting, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    first = torch.randn(shape.n, shape.k, device=setting.device).mul_(0.02).to(dtype)
    return [first] + [first.clone() for _ in range(setting.copies(first.nbytes) - 1)]


def _packed(
    setting: Setting, shape: Shape, spec: QuantSpec, activation: str, beside: Sequence[str], against: bool
) -> _Packed:
    bias = activation != "none"
    first = random_layer(shape.n, shape.k, spec, setting.device, setting.dtype, bias=bias, activation=activation)
    return _Packed(
        copies(setting, first),
        {name: copies(setting, pinned(first, name)) for name in beside},
        peers(setting, shape.n, shape.k, spec.bits, spec.group_size) if against else {},
    )


def copies(setting: Setting, first: QuantLinear) -> list[QuantLinear]:
    """A layer, and as many twins of it as take up what weights rotate through."""
    return [first] + [twin(first) for _ in range(setting.copies(first.packed_bytes) - 1)]


def _rows(
    setting: Setting, shape: Shape, packed: Sequence[_Packed], dense: dict[str, list[Tensor]], m: int, rounded: bool
) -> Iterator[Row]:
    """A row for each width."""
    x = torch.randn(m, shape.k, device=setting.device)
    first = packed[0].layers[0]
    bias = dict(first.named_parameters()).get("bias")
    calls: dict[str, Call] = {
        name: _dense_calls(weights, x.to(weights[0].dtype), bias, first.activation) for name, weights in dense.items()
    }
    for one in packed:
        calls |= {f"{name} {one.bits}": call for name, call in one.calls(x, setting.dtype, rounded).items()}
    limits = setting.limits
    if setting.device.type == "cpu":
        calls["reading"] = setting.reading[1]
    took = replace(setting, seconds=setting.seconds * len(packed)).timed(calls)
    if setting.device.type == "cpu":
        limits = replace(limits, gb_per_s=setting.reading[0] / took["reading"]["us"] / 1e3)
    for one in packed:
        ending = f" {one.bits}"
        own = {name.removesuffix(ending): taken for name, taken in took.items() if name.endswith(ending)}
        yield _row(setting, shape, one, m, own | {name: took[name] for name in dense}, limits)


def _row(
    setting: Setting, shape: Shape, one: _Packed, m: int, took: dict[str, dict[str, float]], limits: Limits
) -> Row:
    """One width's row from the times of its calls and of torch's."""
    first, n, k = one.layers[0], shape.n, shape.k
    packed, moved = took["packed"], moved_bytes(first, m, setting.dtype)
    limit_us = limits.us(moved, operations(m, n, k))
    row: Row = {
        "bench": "gemm",
        "shape": shape.name,
        "bits": first.spec.bits,
        "group": first.spec.group_size,
        "symmetric": first.spec.symmetric,
        "activation": first.activation,
        "m": m,
        "n": n,
        "k": k,
        "dtype": setting.dtype_name,
        **packed,
        "tflops": operations(m, n, k) / packed["us"] / 1e6,
        "weight_bytes": first.packed_bytes,
        "bytes": moved,
        "gb_per_s": moved / packed["us"] / 1e3,
        "read_gb_per_s": setting.limits.gb_per_s,
        "read_in_turns_gb_per_s": limits.gb_per_s,
        "matmul_tflops": limits.tflops,
        "bandwidth_share": moved / packed["us"] / 1e3 / limits.gb_per_s,
        "limit_us": limit_us,
        "share_of_limit": limit_us / packed["us"],
        "rotated_bytes": len(one.layers) * first.packed_bytes,
        "backend": first.backend,
        "kernel": mmq_kernels.explain(first, m),
    }
    for name in setting.baselines:
        row[f"torch_{name}_us"] = took[name]["us"]
        row[f"x_torch_{name}"] = took[name]["us"] / packed["us"]
        row[f"x_torch_{name}_best"] = took[name]["us_min"] / packed["us_min"]
    if "a8" in took:
        row["a8_us"] = took["a8"]["us"]
        row["x_a8"] = packed["us"] / took["a8"]["us"]
        row["peak_int8_tops"] = setting.limits.int8_tops
        a8_limit = limits.us(moved, operations(m, n, k), limits.int8_tops or limits.tflops)
        row["a8_share_of_limit"] = a8_limit / took["a8"]["us"]
    for name in (*one.others, *one.rivals):
        row[f"{name}_us"] = took[name]["us"]
    for name in one.others:
        row[f"{name}_x_torch_{setting.dtype_name}"] = took[setting.dtype_name]["us"] / took[name]["us"]
    return row


def _rounded(layer: QuantLinear) -> QuantLinear:
    """A layer of the same tensors whose activations are rounded to 8 bits."""
    other = QuantLinear.__new__(QuantLinear)
    other.__dict__.update(layer.__dict__)
    other.activation_bits = 8
    return other


def _packed_calls(layers: list[QuantLinear], x: Tensor) -> Rotation:
    return Rotation([lambda layer=layer: layer(x) for layer in layers])  # type: ignore[misc]


def _dense_calls(weights: list[Tensor], x: Tensor, bias: Tensor | None, activation: str) -> Rotation:
    added, epilogue = None if bias is None else bias.to(x.dtype), _EPILOGUES[activation]
    linear = torch.nn.functional.linear
    if activation == "none":
        return Rotation([lambda weight=weight: linear(x, weight, added) for weight in weights])  # type: ignore[misc]
    return Rotation([lambda weight=weight: epilogue(linear(x, weight, added)) for weight in weights])  # type: ignore[misc]


def bench_overhead(setting: Setting, bits: Sequence[int], *, size: int = 1024) -> Iterator[Row]:
    """Host microseconds of an eager call with m = 1, packed and torch's: what small layers cost without a graph."""
    weight = torch.randn(size, size, device=setting.device).to(setting.dtype)
    x = torch.randn(1, size, device=setting.device).to(setting.dtype)
    for width in bits:
        layer = random_layer(size, size, QuantSpec(width, 128), setting.device, setting.dtype)
        yield {
            "bench": "overhead",
            "bits": width,
            "group": 128,
            "m": 1,
            "n": size,
            "k": size,
            "dtype": setting.dtype_name,
            "host_us": host_overhead(lambda layer=layer: layer(x), setting.device),  # type: ignore[misc]
            "torch_host_us": host_overhead(lambda: torch.nn.functional.linear(x, weight), setting.device),
            "backend": layer.backend,
        }
