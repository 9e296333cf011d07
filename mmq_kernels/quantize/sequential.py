"""Quantizing block by block: what a block is calibrated on has gone through the quantized blocks before it.

A model is a sequence of stages (lists of blocks, in the order in which they run). For each stage one pass over the
calibration batches records what its blocks are called with; then each block in turn is run for its Hessians,
quantized, and run again for what the next block gets to see (walk.py). One block's Hessians are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize.awq import awq, search_scale
from mmq_kernels.quantize.folding import find_producer, fold
from mmq_kernels.quantize.gptq import caught_up, weighted_error
from mmq_kernels.quantize.hessian import Factor
from mmq_kernels.quantize.recipe import CALIBRATED
from mmq_kernels.quantize.rtn import Quantized, check_finite, quantize_weight
from mmq_kernels.quantize.settings import GptqSettings
from mmq_kernels.quantize.together import Reading, gptq_together
from mmq_kernels.quantize.walk import Batch, Job, SharedHessian, Stage, Walk, frozen, record, without_cache
from mmq_kernels.spec import QuantSpec

Progress = Callable[[int, int, str], None]
Hold = Callable[[str], AbstractContextManager[None]]
"""A context in which the tensors of the block of that name are in memory."""


def in_memory(block: str) -> AbstractContextManager[None]:
    """Of a model that is in memory anyway."""
    return nullcontext()


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name, bits, group_size, symmetric: of the layer.
        asked, used: method asked for and used; they differ where `note` says why.
        calibration_rows: rows of activations its Hessian was made of.
        damping: what its Hessian took.
        error, rtn_error: Hessian-weighted error, and that of rtn with the same spec (gptq and awq).
        folded_into: the norm or linear that took its input scale (awq).
        note: anything that did not go as asked.
    """

    name: str
    bits: int
    group_size: int
    symmetric: bool
    asked: str
    used: str
    calibration_rows: int = 0
    damping: float | None = None
    error: float | None = None
    rtn_error: float | None = None
    folded_into: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Finished = tuple[dict[str, dict[str, Tensor]], list[LayerReport]]
"""Of a finished block: the tensors of each layer, and of what took their scales, by name; and the layers' reports."""


class BlockStore(Protocol):
    """Where finished blocks are kept, so that a killed run goes on behind the last of them."""

    def load(self, block: str) -> Finished | None:
        """A finished block, or None."""

    def save(self, block: str, layers: dict[str, dict[str, Tensor]], reports: list[LayerReport]) -> None:
        """Keep a finished block."""


def quantize_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    batches: Iterable[Batch],
    *,
    settings: GptqSettings = GptqSettings(),  # noqa: B008 (frozen)
    store: BlockStore | None = None,
    hold: Hold = in_memory,
    progress: Progress | None = None,
) -> list[LayerReport]:
    """Replace the layers of all jobs in `model` by `QuantLinear`s.

    Args:
        model: a transformers model in eval mode; changed in place.
        stages: in the order in which the model runs them.
        batches: calibration, keyword arguments of `model`; may be empty where no job needs data.
        settings: of GPTQ.
        store: finished blocks are taken from and put into it.
        hold: brings a block's tensors in, for a model that is not all in memory.
        progress: told (blocks done, blocks in all, name) after each block.

    Returns:
        One report a layer, in order.

    Raises:
        QuantizationError: naming the layer that failed.
    """
    batches = list(batches)
    total, done = sum(len(stage.blocks) for stage in stages), 0
    reports: list[LayerReport] = []
    with torch.no_grad(), without_cache(model), frozen(model):
        for stage in stages:
            walk: Walk | None = None
            last = max(
                (i for i, jobs in enumerate(stage.jobs) if any(j.method in CALIBRATED for j in jobs)), default=-1
            )
            for index, (block, jobs) in enumerate(zip(stage.blocks, stage.jobs, strict=True)):
                if index <= last and batches and (walk is None or index == walk.end):
                    walk = record(model, stage, batches, index)
                with hold(block):
                    finished = store.load(block) if store else None
                    if finished is not None:
                        if settings.catch_up and walk and index < last:
                            walk.keep_track(model, index, {}, ())
                        install(model, *finished)
                        rows = finished[1]
                    else:
                        rows = quantize_block(model, walk if index <= last else None, index, jobs, settings)
                        if store:
                            store.save(block, _tensors(model, rows), rows)
                    reports += rows
                    if walk and index < last:
                        walk.advance(model, index)
                done += 1
                if progress:
                    progress(done, total, block)
    return reports


def quantize_block(
    model: nn.Module,
    walk: Walk | None,
    index: int,
    jobs: Sequence[Job],
    settings: GptqSettings,
    hessians: Mapping[str, SharedHessian] | None = None,
) -> list[LayerReport]:
    """Replace the layers of one block, on what `walk` brings to it.

    Args:
        walk: stands before block `index`; None where no job looks at activations.
        hessians: what `walk.hessians` gives, where it is known already; drift that `catch_up` wants is in it then.
    """
    if hessians is None:
        hessians = walk.hessians(model, index, jobs) if walk else {}
        if walk and settings.catch_up:
            walk.keep_track(model, index, hessians, jobs)
    scales = _search_scales(model, walk, index, jobs, hessians) if walk else {}
    by_gptq = _gptq_together(model, jobs, hessians, settings)
    return [_quantize_layer(model, job, hessians, scales, by_gptq) for job in jobs]


def _gptq_together(
    model: nn.Module, jobs: Sequence[Job], hessians: Mapping[str, SharedHessian], settings: GptqSettings
) -> dict[str, _ByGptq]:
    """What GPTQ makes of a block's layers, by name: those that read one input and get one spec in one pass."""
    alike: dict[tuple[str, QuantSpec], dict[int, list[Job]]] = {}
    for job in jobs:
        if job.method in ("gptq", "gptq+") and job.name in hessians and hessians[job.name].sums.rows:
            readers = alike.setdefault((job.method, job.spec), {})
            readers.setdefault(id(hessians[job.name]), []).append(job)
    found: dict[str, _ByGptq] = {}
    for (method, spec), readers in alike.items():
        used = settings.beyond() if method == "gptq+" else settings
        readings: list[Reading] = []
        for together in readers.values():
            weights = [_linear(model, job.name).weight.detach() for job in together]
            for job, weight in zip(together, weights, strict=True):
                with _named(job.name):
                    check_finite(weight)
            name = together[0].name
            drift = hessians[name].sums.drift() if used.catch_up else None
            if drift is not None:
                factor = hessians[name].factor(used, name)
                weights = [caught_up(weight, drift, factor, used.catch_up) for weight in weights]
            readings.append((weights, partial(hessians[name].factor, used, name)))
        done = gptq_together(readings, spec, used)
        for together, (targets, given), results in zip(readers.values(), readings, done, strict=True):
            found |= {
                job.name: _ByGptq(result, given(), used, target)
                for job, target, result in zip(together, targets, results, strict=True)
            }
    return found


# --- one layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ByGptq:
    """A layer's codes, and what they were found with; the target is its weight, or what `caught_up` made of it."""

    quantized: Quantized
    factor: Factor
    settings: GptqSettings
    target: Tensor


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Says of which layer a ValueError is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from None


@dataclass(frozen=True)
class _InputScale:
    """AWQ's scale ``[k]`` of a layer's input; a folded one is in the layer's weight already."""

    values: Tensor
    folded_into: str = ""


def _search_scales(
    model: nn.Module, walk: Walk, index: int, jobs: Sequence[Job], hessians: Mapping[str, SharedHessian]
) -> dict[str, _InputScale]:
    """AWQ's input scales of a block's layers, by name: one for all layers that read the same input."""
    shared: dict[int, list[Job]] = {}
    for job in jobs:
        if job.method == "awq" and job.name in hessians:
            shared.setdefault(id(hessians[job.name]), []).append(job)
    if not shared:
        return {}
    block = walk.block(index)
    expected = walk.outputs(model, index)
    found: dict[str, _InputScale] = {}
    # From back to front: a scale that a linear takes changes its rows, and so the search for its own input's.
    for together in reversed(list(shared.values())):
        linears = [_linear(model, job.name) for job in together]
        before = [linear.weight.data for linear in linears]

        def run() -> list[Tensor]:
            return walk.outputs(model, index)

        def loss(weights: Sequence[Tensor], linears: list[nn.Linear] = linears) -> float:
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.data = weight
            return sum(
                float((got - wanted).float().square().sum(dtype=torch.float64))
                for got, wanted in zip(run(), expected, strict=True)
            )

        try:
            specs = [job.spec for job in together]
            magnitude = hessians[together[0].name].sums.magnitude()
            scale = search_scale(list(zip(before, specs, strict=True)), magnitude, loss)
        finally:
            for linear, weight in zip(linears, before, strict=True):
                linear.weight.data = weight
        folded_into = ""
        producer = find_producer(model.get_submodule(block), block, linears, run)
        if producer is not None:
            scale, folded_into = fold(producer, linears, scale), producer.name
        found |= {job.name: _InputScale(scale, folded_into) for job in together}
    return found


def _quantize_layer(
    model: nn.Module,
    job: Job,
    hessians: Mapping[str, SharedHessian],
    scales: Mapping[str, _InputScale],
    by_gptq: Mapping[str, _ByGptq],
) -> LayerReport:
    linear = _linear(model, job.name)
    weight = linear.weight.detach()
    spec = job.spec
    report = LayerReport(job.name, spec.bits, spec.group_size, spec.symmetric, asked=job.method, used=job.method)
    scale = scales.get(job.name)
    kept = None
    if scale is not None and scale.folded_into:
        weight = weight.float() / scale.values
        report = replace(report, folded_into=scale.folded_into)
    elif scale is not None:
        kept = scale.values.to(weight.dtype)
    with _named(job.name):
        values = None if scale is None else scale.values
        quantized, report = _quantize(weight, job, hessians.get(job.name), values, by_gptq.get(job.name), report)
    if quantized.scale.dtype == torch.float32 and linear.weight.dtype == torch.float32:
        report = replace(report, note=f"{report.note} scales kept in fp32: fp16 cannot hold them".strip())
    codes, grid, zero, g_idx = quantized
    replacement = QuantLinear.from_codes(
        codes,
        grid,
        zero,
        spec,
        bias=linear.bias,
        g_idx=g_idx,
        input_scale=kept,
        dtype=linear.weight.dtype,
    )
    model.set_submodule(job.name, replacement)
    return report


def _quantize(
    weight: Tensor,
    job: Job,
    shared: SharedHessian | None,
    scale: Tensor | None,
    by_gptq: _ByGptq | None,
    report: LayerReport,
) -> tuple[Quantized, LayerReport]:
    spec = job.spec
    if job.method not in CALIBRATED:
        return quantize_weight(weight, spec, per_tensor=job.per_tensor), report
    nearest = quantize_weight(weight, spec)
    if shared is None or not shared.sums.rows:
        return nearest, replace(report, used="rtn", note="no calibration data reached this layer")
    if scale is not None:
        hessian = shared.sums.value()
        best = awq(weight, hessian, scale, spec)
        error = weighted_error(weight, best.dequantize(spec) / scale, hessian)
        nearest_error = weighted_error(weight, nearest.dequantize(spec), hessian)
        return best, replace(report, calibration_rows=shared.sums.rows, error=error, rtn_error=nearest_error)
    assert by_gptq is not None
    best, factor, target = by_gptq.quantized, by_gptq.factor, by_gptq.target
    error = weighted_error(target, best.dequantize(spec), factor.hessian)
    nearest_error = weighted_error(target, nearest.dequantize(spec), factor.hessian)
    report = replace(
        report,
        calibration_rows=shared.sums.rows,
        damping=factor.damping,
        error=error,
        rtn_error=nearest_error,
        note="" if factor.damping == by_gptq.settings.damping else f"damping raised to {factor.damping:g}",
    )
    if error > nearest_error:
        note = f"{report.note} gptq's error {error:.3g} was above rtn's: rtn kept".strip()
        return nearest, replace(report, used="rtn", error=nearest_error, note=note)
    return best, report


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _tensors(model: nn.Module, reports: Sequence[LayerReport]) -> dict[str, dict[str, Tensor]]:
    """By name the tensors of the layers, and of what took their scales."""
    names = dict.fromkeys([row.name for row in reports] + [row.folded_into for row in reports if row.folded_into])
    found: dict[str, dict[str, Tensor]] = {}
    for name in names:
        module = model.get_submodule(name)
        found[name] = {key: parameter.detach() for key, parameter in module.named_parameters(recurse=False)}
        if isinstance(module, QuantLinear):
            found[name] |= module.on_disk()
    return found


def install(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]], reports: Sequence[LayerReport]) -> None:
    """Put a finished block's layers, and what took their scales, into the model; layers that are there are left."""
    specs = {row.name: QuantSpec(row.bits, row.group_size, row.symmetric) for row in reports}
    for name, stored in tensors.items():
        module = model.get_submodule(name)
        if isinstance(module, QuantLinear):
            continue
        if name in specs:
            linear = _linear(model, name)
            own = {key: tensor.to(linear.weight.device) for key, tensor in stored.items()}
            model.set_submodule(name, QuantLinear.from_tensors(own, specs[name], dtype=linear.weight.dtype))
        else:
            for key, tensor in stored.items():
                module.get_parameter(key).data.copy_(tensor)
