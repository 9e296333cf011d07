"""What the tests of the compiled backends share: random weights, and an independent fp64 reference."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmq_kernels import _native, packing
from mmq_kernels.backends import Backend, PackedWeight, backend
from mmq_kernels.spec import QuantSpec

ISAS = _native.isas() if _native.available() else ()
CPU = backend("cpu")
NO_EXTENSION = f"no compiled extension: {_native.why_missing()}"

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": lambda y: y.clamp(min=0),
    "gelu": lambda y: 0.5 * y * (1 + torch.erf(y / 2**0.5)),
    "gelu_tanh": lambda y: 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
    "quick_gelu": lambda y: y / (1 + torch.exp(-1.702 * y)),
    "silu": lambda y: y / (1 + torch.exp(-y)),
}


class Case:
    """A weight given by codes, scales and zeros, in the layout of `owner` on `device`, and in fp64 on the CPU.

    Zeros take both ends of the code range; `power_of_two` scales make sums of integers exact; all codes
    are `code` if that is given.
    """

    def __init__(
        self,
        spec: QuantSpec,
        n: int,
        k: int,
        scale_dtype: torch.dtype,
        power_of_two: bool = False,
        owner: Backend = CPU,
        device: str = "cpu",
        code: int | None = None,
    ):
        self.spec, self.n, self.k = spec, n, k
        groups, length = spec.groups(k), spec.group_length(k)
        self.codes = torch.randint(0, spec.max_code + 1, (n, k), dtype=torch.uint8)
        self.codes[:, 0], self.codes[:, -1] = 0, spec.max_code
        if code is not None:
            self.codes.fill_(code)
        zero = torch.randint(0, spec.max_code + 1, (n, groups), dtype=torch.uint8)
        zero.view(-1)[::3], zero.view(-1)[1::3] = 0, spec.max_code
        self.zero = torch.full_like(zero, 2 ** (spec.bits - 1)) if spec.symmetric else zero
        exact = 0.5 ** torch.randint(0, 2, (n, groups))
        self.scale = (exact if power_of_two else torch.rand(n, groups) * 0.02 + 1e-4).to(scale_dtype)
        self.packed = PackedWeight(
            packing.pack_stream(self.codes, spec.bits),
            self.scale,
            None if spec.symmetric else packing.pack_stream(self.zero.t().contiguous(), spec.bits).t().contiguous(),
        )
        moved = PackedWeight(*(None if part is None else part.to(device) for part in self.packed))
        self.runtime = owner.prepack(moved, spec, n, k)
        column = torch.arange(k) // length
        scale64, zero64 = self.scale.double()[:, column], self.zero.double()[:, column]
        self.dense = scale64 * (self.codes.double() - zero64)
        """W in fp64."""
        middle = 2 ** (spec.bits - 1)
        self.magnitude: Tensor = scale64 * ((self.codes.double() - middle).abs() + (zero64 - middle).abs())
        """Size of the terms that a kernel adds when it factors the zero point out."""

    def gemm(self, x: Tensor, bias: Tensor | None = None, activation: str = "none", isa: str = "") -> Tensor:
        return CPU.gemm(x, self.runtime, bias, self.spec, self.n, "cpu", activation, isa=isa)


UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def linear_bound(
    case: Case, x: Tensor, bias: Tensor | None, activation: str, rounded_weights: bool = False
) -> tuple[Tensor, Tensor]:
    """What a gemm should give, in fp64, and how far each output may be from it.

    The bound: twice the error of dequantize + matmul in x's dtype, plus a floor of one rounding of the output and the
    fp32 roundings of the terms a kernel adds (|x| times the magnitudes of code and zero point about the centre of the
    codes); the slope of an activation is at most 1.13.

    Args:
        rounded_weights: the kernel rounds weights to x's dtype before it multiplies: what that alone does to an output
            is in dequantize + matmul too, but may be hidden there by the rounding of the output.
    """
    act = ACTIVATIONS[activation]
    added = 0 if bias is None else bias.double()
    before = x.double() @ case.dense.t() + added
    expected = act(before)
    plain = act(torch.nn.functional.linear(x, case.dense.to(x.dtype), bias).double()).to(x.dtype).double()
    floor = UNIT_ROUNDOFF[x.dtype] * expected.abs() + 2e-8  # 2e-8: half a step of fp16's subnormals
    floor += UNIT_ROUNDOFF[torch.float32] * (2 * (x.double().abs() @ case.magnitude.t()) + 4 * before.abs())
    if rounded_weights:
        floor += (act(x.double() @ case.dense.to(x.dtype).double().t() + added) - expected).abs()
    return expected, 2 * (plain - expected).abs() + floor


def sample(axes: Sequence[Sequence], seed: int, count: int) -> Iterator[tuple]:
    """Cases in which every value of every axis appears, in random company."""
    draw = random.Random(seed)
    columns = []
    for axis in axes:
        values = list(axis) * (count // len(axis) + 1)
        draw.shuffle(values)
        columns.append(values[:count])
    return zip(*columns, strict=True)
