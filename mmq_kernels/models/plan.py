"""What a recipe means for a given model: every linear is planned, or listed as left alone with the reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from mmq_kernels.models.families import Family, family_of, layer_kind
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
    """

    name: str
    component: str | None
    stage: int | None = None
    block: str | None = None
    block_group: str | None = None
    kind: str | None = None
    reason: str = ""


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
    for index, stage in enumerate(family.stages):
        module = _get(model, stage.path)
        if isinstance(module, nn.Linear):
            found[stage.path] = Layer(stage.path, stage.component, index, stage.path)
        elif module is not None:
            blocks = list(module.named_children())
            for number, (child, block) in enumerate(blocks):
                name = f"{stage.path}.{child}"
                for inner, linear in block.named_modules():
                    if isinstance(linear, nn.Linear):
                        full = f"{name}.{inner}"
                        group = block_group(number, len(blocks))
                        found[full] = Layer(full, stage.component, index, name, group, layer_kind(inner))
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name not in found:
            reason = family.left_alone.get(name, "outside the blocks of every component")
            found[name] = Layer(name, _component_of(family, name), reason=reason)
    return list(found.values())


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Apply a recipe to the layers of a model, which may be on the meta device.

    Raises:
        ValueError: for a component that the model lacks, or a rule or pattern that selects nothing.
    """
    family = family_of(model)
    layers = list_layers(model)
    for rule in recipe.rules:
        _check_rule(rule, layers, family)
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
    return Plan(planned, left_alone, list(_stages(model, family, layers, planned)))


def _check_rule(rule: Rule, layers: list[Layer], family: Family) -> None:
    if rule.target in COMPONENTS and rule.target not in family.parts:
        raise ValueError(f"the model has no component {rule.target!r} ({rule}); it has {', '.join(family.parts)}")
    if any(_selects(rule, layer) for layer in layers):
        return
    if rule.is_pattern:
        raise ValueError(
            f"{rule.target!r} is no component ({', '.join(family.parts)}) and matches no layer ({rule}); "
            f"nearest: {_nearest(rule.target, layers)}"
        )
    raise ValueError(f"{rule} selects no layer of the model")


def _selects(rule: Rule, layer: Layer) -> bool:
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


def _stages(model: nn.Module, family: Family, layers: list[Layer], planned: dict[str, LayerPlan]) -> Iterator[Stage]:
    for index, path in enumerate(family.stages):
        module = _get(model, path.path)
        if module is None:
            continue
        blocks = [path.path]
        if not isinstance(module, nn.Linear):
            blocks = [f"{path.path}.{child}" for child, _ in module.named_children()]
        inside = [layer for layer in layers if layer.stage == index and layer.name in planned]
        jobs = [tuple(_job(planned[la.name]) for la in inside if la.block == block) for block in blocks]
        if any(jobs):
            # Blocks behind the last planned one need not be walked through.
            end = max(i for i, own in enumerate(jobs) if own) + 1
            yield Stage(path.path, tuple(blocks[:end]), tuple(jobs[:end]), path.once)
    for layer in layers:
        if layer.stage is None and layer.name in planned:
            yield Stage(layer.name, (layer.name,), ((_job(planned[layer.name]),),), once=True)


def _job(plan: LayerPlan) -> Job:
    return Job(plan.name, plan.method, plan.spec, plan.per_tensor)


def _component_of(family: Family, name: str) -> str | None:
    for component, prefixes in family.parts.items():
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return component
    return None


def _get(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
