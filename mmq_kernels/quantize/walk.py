"""The walk through a model that calibration takes: what each block is called with, and what its layers see.

One pass over the batches notes the calls of a chain of blocks, each of which is fed by the one before it; then blocks
can be run one by one, as they are at the time, each on what those before it have made of the batches. That pass runs
the first block alone: what else a block is called with does not depend on what those before it computed. (Where that
block changes the shape of the hidden states, nothing of the kind is taken for granted, and all blocks run.) Where a
model does something to the hidden states between two blocks (Qwen3-VL adds features of its vision tower there), the
chain ends, and the next begins with a pass of its own. Recorded activations stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from mmq_kernels.quantize.hessian import Factor, Hessian, factorize
from mmq_kernels.quantize.recipe import CALIBRATED
from mmq_kernels.quantize.settings import GptqSettings
from mmq_kernels.spec import QuantSpec

Batch = Mapping[str, Any]
"""Keyword arguments of one call of the model."""


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


class _StageDone(Exception):
    """Ends a recording pass behind the last block."""


class SharedHessian:
    """A Hessian and its factors, each computed when the first of the layers that share it asks."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.sums = Hessian(k, device)
        self._factors: dict[str, Factor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and of a factor of it."""
        return 2 * self.sums.nbytes

    def factor(self, settings: GptqSettings, name: str) -> Factor:
        if settings.order not in self._factors:
            self._factors[settings.order] = factorize(self.sums.value(), settings, name)
        return self._factors[settings.order]


@dataclass
class _Call:
    """One passage of one batch through a chain.

    Attributes:
        hidden: what has become of the hidden states.
        wanted: what the float blocks of the chain would have made of them, where somebody keeps track.
        arguments: by index of the block what else it is called with; a block that the passage leaves out has none.
    """

    hidden: Tensor
    arguments: dict[int, _Arguments]
    wanted: Tensor | None = None


@dataclass
class _Arguments:
    """Of one call of one block, with None in the place of the hidden states.

    Attributes:
        slot: that place, 0 or a keyword.
    """

    slot: int | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Walk:
    """The recorded calls of a chain of blocks, and the hidden states as far as quantized blocks have brought them.

    Attributes:
        end: index of the first block behind the chain.
    """

    def __init__(self, stage: Stage, calls: list[_Call], end: int, device: torch.device) -> None:
        self._stage, self._calls, self.end, self._device = stage, calls, end, device

    def hessians(self, model: nn.Module, index: int, jobs: Sequence[Job]) -> dict[str, SharedHessian]:
        """Run block `index` on what reaches it; one Hessian for each distinct input of its gptq layers."""
        found: dict[str, SharedHessian] = {}
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
                        found[name] = SharedHessian(x.shape[-1], x.device)
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

    def copy(self) -> Walk:
        """The same calls; what becomes of the hidden states of one leaves the other's alone."""
        return Walk(self._stage, [replace(call) for call in self._calls], self.end, self._device)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held for the calls."""
        tensors: dict[int, Tensor] = {}

        def see(value: Any) -> None:
            if isinstance(value, Tensor):
                tensors[id(value)] = value

        for call in self._calls:
            tree_map(see, [call.hidden, call.wanted, *((each.args, each.kwargs) for each in call.arguments.values())])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def keep_track(
        self, model: nn.Module, index: int, hessians: Mapping[str, SharedHessian], jobs: Sequence[Job]
    ) -> None:
        """Take the float hidden states through block `index`, which is still float, and see how far inputs drifted."""
        first: dict[int, str] = {}  # of the layers that share a Hessian
        for job in jobs:
            if job.name in hessians:
                first.setdefault(id(hessians[job.name]), job.name)
        seen: dict[str, list[Tensor]] = {name: [] for name in first.values()}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen[name].append(args[0] if args else kwargs["input"])

            return hook

        with ExitStack() as hooks:
            for name in seen:
                handle = model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
                hooks.callback(handle.remove)
            for call in self._calls:
                drifted = call.wanted is not None
                if drifted:
                    self._run(model, index, call)
                actual = {name: inputs.copy() for name, inputs in seen.items()}
                for inputs in seen.values():
                    inputs.clear()
                call.wanted = _first(self._run(model, index, call, call.wanted)).cpu()
                for name, inputs in seen.items():
                    for wanted, x in zip(inputs, actual[name], strict=drifted):
                        hessians[name].sums.add_drift(wanted, x)
                    inputs.clear()

    def block(self, index: int) -> str:
        """Name of block `index`."""
        return self._stage.blocks[index]

    def outputs(self, model: nn.Module, index: int) -> list[Tensor]:
        """What block `index`, as it is now, makes of every call; on the CPU."""
        return [_first(self._run(model, index, call)).cpu() for call in self._calls]

    def advance(self, model: nn.Module, index: int) -> None:
        """Take every call's hidden states through block `index` as it is now."""
        if index + 1 == self.end:
            return
        for call in self._calls:
            call.hidden = _first(self._run(model, index, call)).cpu()

    def _run(self, model: nn.Module, index: int, call: _Call, hidden: Tensor | None = None) -> Any:
        """Block `index` on a call's hidden states, or on others in their place."""
        hidden = call.hidden if hidden is None else hidden
        if index not in call.arguments:
            return hidden
        own = call.arguments[index]
        args, kwargs = tree_map(self._to_device, (own.args, own.kwargs))
        hidden = hidden.to(self._device)
        block = model.get_submodule(self._stage.blocks[index])
        if isinstance(own.slot, int):
            return block(hidden, *args[1:], **kwargs)
        return block(*args, **{**kwargs, own.slot: hidden})

    def _to_device(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, Tensor) else value


def record(model: nn.Module, stage: Stage, batches: Sequence[Batch], start: int = 0) -> Walk:
    """One pass over the batches that notes what the chain of blocks that begins at `start` is called with."""
    device = next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    calls: list[_Call] = []
    ends = [len(stage.blocks)]
    moved: dict[int, tuple[Any, Any]] = {}

    def keep(value: Any) -> Any:
        """On the CPU, shared tensors once; caches are dropped: a replayed block must not append to them."""
        if isinstance(value, Cache):
            return None
        if not isinstance(value, Tensor):
            return value
        return moved.setdefault(id(value), (value, value.detach().cpu()))[1]

    last_output: list[Any] = [None]
    first_shape: list[Any] = [None, None]

    def pass_on(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if first_shape[0] != first_shape[1]:
                return run(*args, **kwargs)
            slot = _slot(args, kwargs)
            hidden = args[slot] if isinstance(slot, int) else kwargs[slot]
            return hidden if isinstance(last_output[0], Tensor) else (hidden, *last_output[0][1:])

        return forward

    def enter(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            slot = _slot(args, kwargs)
            hidden = args[slot] if isinstance(slot, int) else kwargs[slot]
            if index == start:
                first_shape[0] = hidden.shape
                calls.append(_Call(hidden.detach().cpu(), {}))
            elif not calls or index >= ends[0]:
                return
            elif hidden is not _first(last_output[0]):
                ends[0] = index
                if stage.once:
                    raise _StageDone
                return
            if isinstance(slot, int):
                args = (None, *args[1:])
            else:
                kwargs = {key: value for key, value in kwargs.items() if key != slot}
            calls[-1].arguments[index] = _Arguments(slot, *tree_map(keep, (args, kwargs)))

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last_output[0] = output
            if index == start:
                first_shape[1] = _first(output).shape
            if index + 1 == ends[0] and stage.once:
                raise _StageDone

        return hook

    with ExitStack() as ended:
        ended.enter_context(_forwards_kept(model))
        for index, name in enumerate(stage.blocks[start:], start):
            block = model.get_submodule(name)
            if stage.once and index > start:
                block.forward = pass_on(block.forward)  # type: ignore[method-assign]
            for handle in (
                block.register_forward_pre_hook(enter(index), with_kwargs=True),
                block.register_forward_hook(leave(index)),
            ):
                ended.callback(handle.remove)
        for batch in batches:
            with suppress(_StageDone), _forwards_kept(model):
                model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
            moved.clear()
            last_output[0] = None
    return Walk(stage, calls, ends[0], device)


@contextmanager
def _forwards_kept(model: nn.Module) -> Iterator[None]:
    """Takes back what is assigned to the forwards of modules: by transformers 4 too, and it forgets on exceptions."""
    before = [(module, module.__dict__.get("forward")) for module in model.modules()]
    try:
        yield
    finally:
        for module, forward in before:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _slot(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Where a block takes its hidden states: first, or by a keyword, which not all models call the same."""
    if args:
        return 0
    tensors = [key for key, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return next((key for key in ("hidden_states", "hidden_state") if key in tensors), tensors[0])


def _first(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


class without_cache:
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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient for a while: torch's matmul takes other paths where one does, no_grad or not."""
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in before:
            parameter.requires_grad_(True)
