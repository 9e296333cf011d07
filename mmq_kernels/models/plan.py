"""What a recipe means for a given model: every linear is planned, or listed as left alone with the reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mmq_kernels.models.families import Blocks, blocks_of, component_of, family_of, layer_kind
from mmq_kernels.quantize.recipe import ALL, BLOCK_GROUPS, COMPONENTS, Recipe, Rule, matches
from mmq_kernels.quantize.sequential import Job, Stage
from mmq_kernels.spec import QuantSpec

NEAREST = 3
"""Names that an error suggests."""


@dataclass(frozen=True)
class Layer:
    """One linear of a model.

    Attributes:
        name: in the model.
        component: vision, connector or language; None for a layer that belongs to none.
        stage: index of its stage, or None.
        block: name of its block, or None for a linear outside blocks.
        block_group: first, middle or last; None outside blocks.
        kind: attention or mlp; None outside blocks.
        reason: why component rules do not reach it, or "".
        fixed: whether no rule at all may reach it.
    """

    name: str
    component: str | None
    stage: int | None = None
    block: str | None = None
    block_group: str | None = None
    kind: str | None = None
    reason: str = ""
    fixed: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done to one layer."""

    name: str
    component: str | None
    kind: str | None
    method: str
    spec: QuantSpec
    per_tensor: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be done to a model.

    Attributes:
        layers: by name, in the order in which the model runs them.
        left_alone: the other linears, and why.
        stages: the same layers as stages of blocks, for `quantize_stages`.
    """

    layers: dict[str, LayerPlan]
    left_alone: dict[str, str]
    stages: list[Stage] = field(default_factory=list)


def block_group(index: int, count: int) -> str:
    """The third of `count` blocks that block `index` is in; where they differ in size, earlier thirds are larger."""
    base, extra = divmod(count, 3)
    first, middle = base + (extra > 0), base + (extra > 1)
    return BLOCK_GROUPS[0 if index < first else 1 if index < first + middle else 2]


def list_layers(model: nn.Module) -> list[Layer]:
    """Every `nn.Linear` of the model: those in blocks, in the order they run, then those outside."""
    family = family_of(model)
    found: dict[str, Layer] = {}
    for index, stage in enumerate(blocks_of(model, family)):
        for number, block in enumerate(stage.names):
            for inner, linear in model.get_submodule(block).named_modules():
                if not isinstance(linear, nn.Linear):
                    continue
                name = f"{block}.{inner}".rstrip(".")
                group = None if stage.single else block_group(number, len(stage.names))
                kind = None if stage.single else layer_kind(inner)
                found[name] = Layer(name, stage.component, index, block, group, kind, *_fixed(linear))
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name not in found:
            why, fixed = _fixed(linear)
            reason = family.left_alone.get(name) or why or "outside the blocks of its component"
            found[name] = Layer(name, component_of(family, name), reason=reason, fixed=fixed)
    return list(found.values())


def _fixed(linear: nn.Linear) -> tuple[str, bool]:
    """Why no rule may reach a linear, or "", and whether that is so."""
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "torch.nn.MultiheadAttention reads its weight itself", True
    return "", False


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Apply a recipe to the layers of a model, which may be on the meta device.

    Raises:
        ValueError: for a component that the model lacks, or a rule or pattern that selects nothing.
    """
    return Planner(model).plan(recipe)


class Planner:
    """What a model consists of, found once for any number of recipes; the model must be as it was then."""

    def __init__(self, model: nn.Module) -> None:
        self._layers, self._blocks = list_layers(model), blocks_of(model, family_of(model))

    def plan(self, recipe: Recipe) -> Plan:
        """See `make_plan`."""
        return _plan(recipe, self._layers, self._blocks)


def _plan(recipe: Recipe, layers: list[Layer], blocks: list[Blocks]) -> Plan:
    for rule in recipe.rules:
        _check_rule(rule, layers)
    for pattern in recipe.skip:
        if not any(matches(pattern, layer.name) for layer in layers):
            raise ValueError(f"skip={pattern} matches no layer; nearest: {_nearest(pattern, layers)}")
    planned: dict[str, LayerPlan] = {}
    left_alone: dict[str, str] = {}
    for layer in layers:
        chosen = [rule for rule in recipe.rules if _selects(rule, layer)]
        skipped = next((p for p in recipe.skip if matches(p, layer.name)), None)
        last = chosen[-1] if chosen else None
        if skipped is not None:
            left_alone[layer.name] = f"skip={skipped}"
        elif last is None:
            left_alone[layer.name] = layer.reason or "no rule selects it"
        elif last.spec is None or last.method is None:
            left_alone[layer.name] = str(last)
        else:
            planned[layer.name] = LayerPlan(
                layer.name, layer.component, layer.kind, last.method, last.spec, last.per_tensor
            )
    return Plan(planned, left_alone, list(_stages(blocks, layers, planned)))


def _check_rule(rule: Rule, layers: list[Layer]) -> None:
    if rule.target in COMPONENTS and rule.target not in _components(layers):
        raise ValueError(
            f"the model has no component {rule.target!r} ({rule}); it has {', '.join(_components(layers))}"
        )
    if any(_selects(rule, layer) for layer in layers):
        return
    if rule.is_pattern:
        raise ValueError(
            f"{rule.target!r} is no component ({', '.join(_components(layers))}) and matches no layer ({rule}); "
            f"nearest: {_nearest(rule.target, layers)}"
        )
    raise ValueError(f"{rule} selects no layer of the model")


def _components(layers: list[Layer]) -> list[str]:
    present = {layer.component for layer in layers}
    return [component for component in COMPONENTS if component in present]


def _selects(rule: Rule, layer: Layer) -> bool:
    if layer.fixed:
        return False
    if rule.is_pattern:
        selected = matches(rule.target, layer.name)
    else:
        selected = not layer.reason and rule.target in (ALL, layer.component)
    return selected and rule.blocks in (ALL, layer.block_group) and rule.kind in (ALL, layer.kind)


def _nearest(pattern: str, layers: list[Layer]) -> str:
    names = [layer.name for layer in layers]
    plain = pattern.removeprefix("re:").replace("\\", "").replace("*", "")
    close = difflib.get_close_matches(plain, names, NEAREST, cutoff=0.0)
    tails = {name.rsplit(".", 1)[-1]: name for name in names}
    close_tails = difflib.get_close_matches(plain.rsplit(".", 1)[-1], tails, 1, cutoff=0.6)
    return ", ".join(dict.fromkeys([*(tails[tail] for tail in close_tails), *close]))


def _stages(parts: list[Blocks], layers: list[Layer], planned: dict[str, LayerPlan]) -> Iterator[Stage]:
    for index, blocks in enumerate(parts):
        inside = [layer for layer in layers if layer.stage == index and layer.name in planned]
        jobs = [tuple(_job(planned[la.name]) for la in inside if la.block == block) for block in blocks.names]
        if any(jobs):
            # Blocks behind the last planned one need not be walked through.
            end = max(i for i, own in enumerate(jobs) if own) + 1
            yield Stage(blocks.path, blocks.names[:end], tuple(jobs[:end]), blocks.once)
    for layer in layers:
        if layer.stage is None and layer.name in planned:
            yield Stage(layer.name, (layer.name,), ((_job(planned[layer.name]),),), once=True)


def _job(plan: LayerPlan) -> Job:
    return Job(plan.name, plan.method, plan.spec, plan.per_tensor)
