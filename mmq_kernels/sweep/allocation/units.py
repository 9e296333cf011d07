"""What an allocation is over: units that get a width each, the widths to choose from, and the recipe that says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mmq_kernels.models.plan import list_layers
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import GptqSettings, Recipe, Rule
from mmq_kernels.quantize.recipe import COMPONENTS, KINDS, LEFT_ALONE
from mmq_kernels.spec import QuantSpec

PER = ("component", "block", "kind")
"""What gets a width of its own: a component, a block, or the attention and the MLP of a block each."""

Choice = QuantSpec | None
"""How a unit's layers are stored; None leaves them alone."""


@dataclass(frozen=True)
class Unit:
    """Layers that get one width.

    Attributes:
        name: of the block, and the kind behind a slash where the block has two.
        component: that it is in.
        block: name of its block.
        kind: attention or mlp where it is but one of them, else "all".
        layers: names, in the order in which they run.
        weights: of its layers.
    """

    name: str
    component: str
    block: str
    kind: str
    layers: tuple[str, ...]
    weights: int

    def rule(self, method: str, choice: Choice) -> Rule:
        """What says it in a recipe."""
        target = self.block if self.layers == (self.block,) else f"{self.block}.*"
        return _rule(target, self.kind, method, choice)


def units_of(model: nn.Module, per: str = "block", components: Sequence[str] = ()) -> list[Unit]:
    """The units of a model, in the order in which they run.

    Args:
        per: block or kind. (Components share the widths of their blocks; see `grouped`.)
        components: only units of these; all where none is named.

    Raises:
        ValueError: for a component that the model lacks, an unknown `per`, or a model without layers to quantize.
    """
    if per not in PER:
        raise ValueError(f"per must be one of {', '.join(PER)}, got {per!r}")
    layers = [layer for layer in list_layers(model) if layer.block is not None and not layer.reason]
    present = [name for name in COMPONENTS if any(layer.component == name for layer in layers)]
    for name in components:
        if name not in present:
            raise ValueError(f"the model has no component {name!r} to allocate bits to; it has {', '.join(present)}")
    found: dict[tuple[str, str], list[str]] = {}
    owner: dict[str, str] = {}
    kinds: dict[str, set[str]] = {}
    for layer in layers:
        if layer.component is not None and layer.block is not None and layer.component in (components or present):
            kind = layer.kind if per == "kind" and layer.kind in KINDS else "all"
            found.setdefault((layer.block, kind), []).append(layer.name)
            owner[layer.block] = layer.component
            kinds.setdefault(layer.block, set()).add(kind)
    if not found:
        raise ValueError(f"a model of class {type(model).__name__} has no layers to allocate bits to")
    units = []
    for (block, kind), names in found.items():
        own = kind if len(kinds[block]) > 1 else "all"
        name = block if own == "all" else f"{block}/{own}"
        weights = sum(linear_of(model, layer).weight.numel() for layer in names)
        units.append(Unit(name, owner[block], block, own, tuple(names), weights))
    return units


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """A layer of a model."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def grouped(units: Sequence[Unit], per: str) -> list[list[int]]:
    """Indices of the units that have to agree: those of a component where it is per component, else each by itself."""
    if per != "component":
        return [[index] for index in range(len(units))]
    members: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit.component, []).append(index)
    return list(members.values())


def choices_of(bits: Sequence[int], groups: Sequence[int], symmetric: bool) -> list[Choice]:
    """All combinations, narrowest first; 16 among the bits leaves a unit alone.

    Raises:
        ValueError: for impossible bits or groups, or no bits.
    """
    if not bits or not groups:
        raise ValueError(f"bits and group must name at least one each, got {list(bits)} and {list(groups)}")
    specs = [
        QuantSpec(b, group, symmetric) for b in sorted(set(bits) - {LEFT_ALONE}) for group in dict.fromkeys(groups)
    ]
    return [*specs, *([None] if LEFT_ALONE in bits else [])]


def named(choice: Choice) -> str:
    """Such as ``3bit:g64:asym``, or ``16``."""
    return str(LEFT_ALONE) if choice is None else str(choice)


def recipe_of(units: Sequence[Unit], chosen: Sequence[Choice], method: str) -> Recipe:
    """A recipe that gives each unit its choice: a rule for each component, and one for each unit that differs.

    Args:
        units: all of those of a component, or none.
    """
    pairs = list(zip(units, chosen, strict=True))
    rules = []
    for component in dict.fromkeys(unit.component for unit in units):
        own = [(unit, choice) for unit, choice in pairs if unit.component == component]
        weights: Counter[Choice] = Counter()
        for unit, choice in own:
            weights[choice] += unit.weights
        usual = weights.most_common(1)[0][0]
        rules.append(_rule(component, "all", method, usual))
        rules += [unit.rule(method, choice) for unit, choice in own if choice != usual]
    return Recipe(rules=tuple(rules))


def _rule(target: str, kind: str, method: str, choice: Choice) -> Rule:
    if choice is None:
        return Rule(target=target, kind=kind, bits=LEFT_ALONE)  # type: ignore[arg-type]
    return Rule(
        target=target,
        kind=kind,  # type: ignore[arg-type]
        method=method,
        bits=choice.bits,
        group_size=choice.group_size,
        symmetric=choice.symmetric,
        per_tensor=method == "uniform",
    )


def packed_bits(
    model: nn.Module, unit: Unit, choice: Choice, method: str, settings: GptqSettings, float_bits: int
) -> int:
    """Bits that the weights of a unit's layers take, as `mmq_kernels.eval.model_size` counts them.

    Codes and padding, scales, zero points, and the order of columns where the method has one. (An input scale that
    awq cannot fold is not known beforehand, and is not in it.)
    """
    return sum(_layer_bits(linear_of(model, name), choice, method, settings, float_bits) for name in unit.layers)


def _layer_bits(linear: nn.Linear, choice: Choice, method: str, settings: GptqSettings, float_bits: int) -> int:
    if choice is None:
        return linear.weight.numel() * float_bits
    used = settings.beyond() if method == "gptq+" else settings
    sorted_columns = method in ("gptq", "gptq+") and used.order == "activation"
    with_order = sorted_columns and choice.groups(linear.in_features) > 1
    empty = QuantLinear(
        linear.in_features,
        linear.out_features,
        choice,
        bias=False,
        activation_order=with_order,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    return 8 * empty.packed_bytes
