"""Quantizing block by block: what a block is calibrated on has gone through the quantized blocks before it.

A model is a sequence of stages (lists of blocks, in the order in which they run). For each stage one pass over the
calibration batches records what its blocks are called with; then each block in turn is run for its Hessians,
quantized, and run again for what the next block gets to see. One block's Hessians are held at a time; recorded
activations stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize.gptq import Factor, GptqSettings, Hessian, factorize, gptq, weighted_error
from mmq_kernels.quantize.recipe import CALIBRATED
from mmq_kernels.quantize.rtn import Quantized, quantize_weight
from mmq_kernels.spec import QuantSpec

Batch = Mapping[str, Any]
"""Keyword arguments of one call of the model."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """One layer to quantize: its name in the model, and how."""

    name: str
    method: str
    spec: QuantSpec
    per_tensor: bool = False


@dataclass(frozen=True)
class Stage:
    """Blocks that run one after the other, each feeding the next.

    Attributes:
        name: for messages.
        blocks: names of the blocks' modules in the model.
        jobs: for each block the layers to quantize in it.
        once: whether a call of the model goes through the stage once, so that the call may stop behind it.
    """

    name: str
    blocks: tuple[str, ...]
    jobs: tuple[tuple[Job, ...], ...]
    once: bool = True

    @property
    def needs_data(self) -> bool:
        return any(job.method in CALIBRATED for jobs in self.jobs for job in jobs)


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name, bits, group_size, symmetric: of the layer.
        asked, used: method asked for and used; they differ where `note` says why.
        calibration_rows: rows of activations its Hessian was made of.
        damping: what its Hessian took.
        error, rtn_error: Hessian-weighted error, and that of rtn with the same spec (gptq only).
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
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class BlockStore(Protocol):
    """Where finished blocks are kept, so that a killed run goes on behind the last of them."""

    def load(self, block: str) -> tuple[dict[str, dict[str, Tensor]], list[LayerReport]] | None:
        """On-disk tensors of each layer of a finished block and their reports, or None."""

    def save(self, block: str, layers: dict[str, dict[str, Tensor]], reports: list[LayerReport]) -> None:
        """Keep a finished block."""


class _StageDone(Exception):
    """Ends a recording pass behind the last block."""


def quantize_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    batches: Iterable[Batch],
    *,
    settings: GptqSettings = GptqSettings(),  # noqa: B008 (frozen)
    store: BlockStore | None = None,
    progress: Progress | None = None,
) -> list[LayerReport]:
    """Replace the layers of all jobs in `model` by `QuantLinear`s.

    Args:
        model: a transformers model in eval mode; changed in place.
        stages: in the order in which the model runs them.
        batches: calibration, keyword arguments of `model`; may be empty where no job needs data.
        settings: of GPTQ.
        store: finished blocks are taken from and put into it.
        progress: told (blocks done, blocks in all, name) after each block.

    Returns:
        One report a layer, in order.

    Raises:
        QuantizationError: naming the layer that failed.
    """
    batches = list(batches)
    total, done = sum(len(stage.blocks) for stage in stages), 0
    reports: list[LayerReport] = []
    with torch.no_grad(), _without_cache(model):
        for stage in stages:
            walk = _record(model, stage, batches) if stage.needs_data and batches else None
            for index, (block, jobs) in enumerate(zip(stage.blocks, stage.jobs, strict=True)):
                finished = store.load(block) if store else None
                if finished is not None:
                    layers, rows = finished
                    _install(model, jobs, layers)
                else:
                    hessians = walk.hessians(model, index, jobs) if walk else {}
                    rows = [_quantize_layer(model, job, hessians, settings) for job in jobs]
                    if store:
                        store.save(block, {job.name: _tensors(model, job.name) for job in jobs}, rows)
                    del hessians
                reports += rows
                if walk:
                    walk.advance(model, index)
                done += 1
                if progress:
                    progress(done, total, block)
    return reports


# --- one layer --------------------------------------------------------------------------------------------------------


class _SharedHessian:
    """A Hessian and its factors, each computed when the first of the layers that share it asks."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.sums = Hessian(k, device)
        self._factors: dict[str, Factor] = {}

    def factor(self, settings: GptqSettings, name: str) -> Factor:
        if settings.order not in self._factors:
            self._factors[settings.order] = factorize(self.sums.value(), settings, name)
        return self._factors[settings.order]


def _quantize_layer(
    model: nn.Module, job: Job, hessians: Mapping[str, _SharedHessian], settings: GptqSettings
) -> LayerReport:
    linear = _linear(model, job.name)
    weight = linear.weight.detach()
    spec = job.spec
    report = LayerReport(job.name, spec.bits, spec.group_size, spec.symmetric, asked=job.method, used=job.method)
    try:
        quantized, report = _quantize(weight, job, hessians.get(job.name), settings, report)
    except ValueError as error:
        raise ValueError(f"{job.name}: {error}") from None
    if quantized.scale.dtype == torch.float32 and weight.dtype == torch.float32:
        report = replace(report, note=f"{report.note} scales kept in fp32: fp16 cannot hold them".strip())
    codes, scale, zero, g_idx = quantized
    replacement = QuantLinear.from_codes(codes, scale, zero, spec, bias=linear.bias, g_idx=g_idx, dtype=weight.dtype)
    model.set_submodule(job.name, replacement)
    return report


def _quantize(
    weight: Tensor, job: Job, shared: _SharedHessian | None, settings: GptqSettings, report: LayerReport
) -> tuple[Quantized, LayerReport]:
    spec = job.spec
    if job.method not in CALIBRATED:
        return quantize_weight(weight, spec, per_tensor=job.per_tensor), report
    nearest = quantize_weight(weight, spec)
    if shared is None or not shared.sums.rows:
        return nearest, replace(report, used="rtn", note="no calibration data reached this layer")
    if job.method == "gptq+":
        settings = settings.beyond()
    factor = shared.factor(settings, job.name)
    best = gptq(weight, factor, spec, settings)
    error = weighted_error(weight, best.dequantize(spec), factor.hessian)
    nearest_error = weighted_error(weight, nearest.dequantize(spec), factor.hessian)
    report = replace(
        report,
        calibration_rows=shared.sums.rows,
        damping=factor.damping,
        error=error,
        rtn_error=nearest_error,
        note="" if factor.damping == settings.damping else f"damping raised to {factor.damping:g}",
    )
    if error > nearest_error:
        note = f"{report.note} gptq's error {error:.3g} was above rtn's: rtn kept".strip()
        return nearest, replace(report, used="rtn", error=nearest_error, note=note)
    return best, report


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    return layer.on_disk()


def _install(model: nn.Module, jobs: Sequence[Job], layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put stored layers into the model."""
    for job in jobs:
        linear = _linear(model, job.name)
        tensors = {name: t.to(linear.weight.device) for name, t in layers[job.name].items()}
        if linear.bias is not None:
            tensors["bias"] = linear.bias.detach()
        model.set_submodule(job.name, QuantLinear.from_tensors(tensors, job.spec, dtype=linear.weight.dtype))


# --- the walk ---------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One passage of one batch through a stage: what each block is called with, but for the hidden states."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    hidden: Tensor


class _Walk:
    """The recorded calls of a stage, and the hidden states as far as the quantized blocks have brought them."""

    def __init__(self, stage: Stage, calls: list[_Call], device: torch.device) -> None:
        self._stage, self._calls, self._device = stage, calls, device

    def hessians(self, model: nn.Module, index: int, jobs: Sequence[Job]) -> dict[str, _SharedHessian]:
        """Run block `index` on what reaches it; one Hessian for each distinct input of its gptq layers."""
        found: dict[str, _SharedHessian] = {}
        owner: dict[str, str] = {}
        seen: dict[int, tuple[Tensor, str]] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else kwargs["input"]
                first = seen.setdefault(id(x), (x, name))[1]  # holding x keeps its id from being used again
                if owner.setdefault(name, first) != first:
                    raise RuntimeError(f"{name} shares its input with {owner[name]} in some calls only")
                if first == name:
                    if name not in found:
                        found[name] = _SharedHessian(x.shape[-1], x.device)
                    found[name].sums.add(x)

            return hook

        watched = [job.name for job in jobs if job.method in CALIBRATED]
        with ExitStack() as hooks:
            for name in watched:
                handle = model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
                hooks.callback(handle.remove)
            for call in self._calls if watched else ():
                self._run(model, index, call)
                seen.clear()
        return {name: found[first] for name, first in owner.items()}

    def advance(self, model: nn.Module, index: int) -> None:
        """Take every call's hidden states through block `index` as it is now."""
        if index + 1 == len(self._stage.blocks):
            return
        for call in self._calls:
            call.hidden = _first(self._run(model, index, call)).cpu()

    def _run(self, model: nn.Module, index: int, call: _Call) -> Any:
        args, kwargs = tree_map(self._to_device, call.arguments[index])
        hidden = call.hidden.to(self._device)
        block = model.get_submodule(self._stage.blocks[index])
        if args:
            return block(hidden, *args[1:], **kwargs)
        return block(**{**kwargs, "hidden_states": hidden})

    def _to_device(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, Tensor) else value


def _record(model: nn.Module, stage: Stage, batches: Sequence[Batch]) -> _Walk:
    """One pass over the batches that notes what the blocks of a stage are called with."""
    device = next(model.parameters()).device
    calls: list[_Call] = []
    moved: dict[int, tuple[Any, Any]] = {}

    def keep(value: Any) -> Any:
        """On the CPU, shared tensors once; caches are dropped: a replayed block must not append to them."""
        if isinstance(value, Cache):
            return None
        if not isinstance(value, Tensor):
            return value
        return moved.setdefault(id(value), (value, value.detach().cpu()))[1]

    last_output: list[Any] = [None]

    def enter(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                calls.append(_Call([], hidden.detach().cpu()))
            elif hidden is not last_output[0]:
                raise RuntimeError(f"{stage.blocks[index]} is not fed by the block before it")
            rest = (None, *args[1:]) if args else ()
            named = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls[-1].arguments.append(tree_map(keep, (rest, named)))

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last_output[0] = _first(output)
            if index + 1 == len(stage.blocks) and stage.once:
                raise _StageDone

        return hook

    with ExitStack() as hooks:
        for index, name in enumerate(stage.blocks):
            block = model.get_submodule(name)
            for handle in (
                block.register_forward_pre_hook(enter(index), with_kwargs=True),
                block.register_forward_hook(leave(index)),
            ):
                hooks.callback(handle.remove)
        for batch in batches:
            with suppress(_StageDone):
                model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
            moved.clear()
            last_output[0] = None
    return _Walk(stage, calls, device)


def _first(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


class _without_cache:
    """Switches key/value caches off in every config of a model for a while."""

    def __init__(self, model: nn.Module) -> None:
        found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        configs = {id(config): config for config in found if hasattr(config, "use_cache")}
        self._before = [(config, config.use_cache) for config in configs.values()]

    def __enter__(self) -> None:
        for config, _ in self._before:
            config.use_cache = False

    def __exit__(self, *error: object) -> None:
        for config, value in self._before:
            config.use_cache = value
