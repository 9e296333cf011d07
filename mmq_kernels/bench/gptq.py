"""GPTQ of one layer: this package's against the paper's loop in plain torch, and against what no kernel can save.

Three ways through the same work, all with the factor of the inverse Hessian counted: `blocks` is what `mmq quantize`
runs, `columns` goes column by column as in algorithm 1 (arXiv 2210.17323), and `chain` does no more than the factor as
everybody makes it (Cholesky, inverse, Cholesky) and the trailing updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmq_kernels import ops
from mmq_kernels.bench.record import Row
from mmq_kernels.bench.setting import Setting
from mmq_kernels.bench.timing import timed
from mmq_kernels.quantize.gptq import gptq
from mmq_kernels.quantize.hessian import factorize
from mmq_kernels.quantize.rtn import Quantized
from mmq_kernels.quantize.settings import GptqSettings
from mmq_kernels.spec import QuantSpec

BLOCK = 128
SPEC = QuantSpec(4, 128)
SETTINGS = GptqSettings(damping=1e-9)


class Grid(NamedTuple):
    """What a way of quantizing found: codes and the weight that they stand for, both ``[n, k]``."""

    codes: Tensor
    weight: Tensor


def upper_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq_by_columns(weight: Tensor, hessian: Tensor, spec: QuantSpec = SPEC, block: int = BLOCK) -> Grid:
    """The loop of the paper in plain torch, one column at a time."""
    weight, hinv = weight.clone(), upper_factor(hessian)
    n, k = weight.shape
    codes, quantized = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    for first in range(0, k, block):
        last = min(k, first + block)
        errors = weight.new_empty(n, last - first)
        for j in range(first, last):
            if j % spec.group_size == 0:
                part = weight[:, j : j + spec.group_size]
                low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
                scale = ((high - low) / spec.max_code).half().float()
                zero = torch.round(-low / scale)
            column = weight[:, j]
            code = (torch.round(column / scale) + zero).clamp(0, spec.max_code)
            codes[:, j], quantized[:, j] = code, scale * (code - zero)
            error = (column - quantized[:, j]) / hinv[j, j]
            weight[:, j:last] -= error[:, None] * hinv[j, j:last]
            errors[:, j - first] = error
        weight[:, last:] -= errors @ hinv[first:last, last:]
    return Grid(codes, quantized)


def gptq_by_blocks(weight: Tensor, hessian: Tensor, spec: QuantSpec = SPEC) -> Quantized:
    """What `mmq quantize` does with a layer, its damping too small to be felt."""
    return gptq(weight, factorize(hessian, SETTINGS, "layer"), spec, SETTINGS)


def _forced(backend: str, weight: Tensor, hessian: Tensor, _: int = 0) -> Quantized:
    with ops.use_backend(backend):
        return gptq_by_blocks(weight, hessian)


def chain(weight: Tensor, hessian: Tensor, block: int = BLOCK) -> Tensor:
    """The factor and the trailing updates alone, with the block's own weights in the place of its errors."""
    weight, hinv = weight.clone(), upper_factor(hessian)
    k = weight.shape[1]
    for first in range(0, k, block):
        last = min(k, first + block)
        weight[:, last:] -= weight[:, first:last] @ hinv[first:last, last:]
    return weight


def weighted_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """``tr(D H D^T)`` with ``D = quantized - weight``: the squared error of the layer's output, up to its samples."""
    difference = quantized - weight
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def bench_gptq(setting: Setting, size: int, *, rounds: int = 3, beside: Sequence[str] = ()) -> Iterator[Row]:
    """One layer size x size, 4 bits, groups of 128, in fp32; how far the two ways agree is part of the row.

    Args:
        rounds: how often each way is timed, all in turns; at least 2.
        beside: backends whose `gptq_block` is timed in the same turns.
    """
    device = setting.device
    x = torch.randn(2 * size, size, device=device)
    hessian = x.t() @ x / (2 * size) + 0.01 * torch.eye(size, device=device)
    weight = torch.randn(size, size, device=device) * 0.02
    ways: dict[str, Callable[[int], Any]] = {
        "columns": lambda _: gptq_by_columns(weight, hessian),
        "blocks": lambda _: gptq_by_blocks(weight, hessian),
        "chain": lambda _: chain(weight, hessian),
        "factor": lambda _: upper_factor(hessian),
    }
    for name in beside:
        ways[name] = partial(_forced, name, weight, hessian)
    # A Cholesky factorization looks at its own success on the host: no graph can hold it.
    took = timed(ways, 0, device, least=rounds, graph=False, clock=setting.clock)
    blocks, columns = gptq_by_blocks(weight, hessian), gptq_by_columns(weight, hessian)
    ours = blocks.dequantize(SPEC)
    yield {
        "bench": "gptq",
        "n": size,
        "k": size,
        "bits": SPEC.bits,
        "group": SPEC.group_size,
        "block": BLOCK,
        "seconds": took["blocks"]["us"] / 1e6,
        "seconds_q1": took["blocks"]["us_q1"] / 1e6,
        "seconds_q3": took["blocks"]["us_q3"] / 1e6,
        "torch_seconds": took["columns"]["us"] / 1e6,
        "chain_seconds": took["chain"]["us"] / 1e6,
        "factor_seconds": took["factor"]["us"] / 1e6,
        "x_torch": took["columns"]["us"] / took["blocks"]["us"],
        "x_chain": took["blocks"]["us"] / took["chain"]["us"],
        "equal_codes": (blocks.codes == columns.codes).float().mean().item(),
        "equal_weights": (ours == columns.weight).float().mean().item(),
        "error_ratio": weighted_error(weight, ours, hessian) / weighted_error(weight, columns.weight, hessian),
        **{f"{name}_seconds": took[name]["us"] / 1e6 for name in beside},
    }
