"""Recipes: what to do to which layer.

A recipe is an ordered list of rules; the last rule that matches a layer decides. One line holds one recipe::

    vision=gptq:4:g64 connector=gptq:8 language=gptq:3:g64 re:.*layers\\.0\\..*=rtn:8 skip=*.fc2

    rule    := target[/blocks][/kind]=method:bits[:granularity][:symmetry]  |  target=16  |  skip=pattern
    target  := vision | connector | language | all | a pattern over layer names (a glob, or re:regex)
    blocks  := first | middle | last | all          thirds of a component's blocks
    kind    := attention | mlp | all
    method  := uniform | rtn | gptq | gptq+ | awq
    bits    := 2..8, or 16 to leave a layer alone
    granularity := gN (N weights share a scale) | channel | tensor
    symmetry    := sym | asym

The same rules as a list of objects, in YAML or JSON, make a recipe file.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from mmq_kernels.quantize.untrusted import expression, read_yaml, shortened
from mmq_kernels.spec import BITS, PER_CHANNEL, QuantSpec

COMPONENTS = ("vision", "connector", "language")
ALL = "all"
BLOCK_GROUPS = ("first", "middle", "last")
KINDS = ("attention", "mlp")
METHODS = ("uniform", "rtn", "gptq", "gptq+", "awq")
CALIBRATED = ("gptq", "gptq+", "awq")
"""Methods that look at activations."""

LEFT_ALONE = 16
"""The bit width that means "not quantized"."""

Blocks = Literal["first", "middle", "last", "all"]
Kind = Literal["attention", "mlp", "all"]


class Rule(BaseModel):
    """What to do to the layers that a target selects.

    Attributes:
        target: a component, "all", or a pattern over layer names.
        blocks, kind: narrow a component to a third of its blocks, to attention or to MLP layers.
        method: uniform, rtn, gptq, gptq+ or awq; None with 16 bits.
        bits: 2..8, or 16.
        group_size: weights that share a scale, -1 for a whole row; None for the method's default.
        per_tensor: one scale for the whole weight (the study's uniform method).
        symmetric: zero point in the middle of the range and not stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    blocks: Blocks = "all"
    kind: Kind = "all"
    method: str | None = None
    bits: int
    group_size: int = PER_CHANNEL
    per_tensor: bool = False
    symmetric: bool = False

    @field_validator("bits", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> int:
        bits = int(value) if isinstance(value, str) and value.isdecimal() else value
        if type(bits) is not int or bits not in (*BITS, LEFT_ALONE):
            raise ValueError(f"bits must be an integer from 2 to 8, or 16, got {value!r}")
        return bits

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                expression(value[3:])
            except ValueError as error:
                got = shortened(repr(value))
                raise ValueError(f"target must be a valid regular expression, got {got} ({error})") from None
        if not value:
            raise ValueError("target must be a component, 'all' or a pattern, got nothing")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if self.bits == LEFT_ALONE:
            if self.method is not None:
                raise ValueError(f"method must be absent at 16 bits, got {self.method!r}")
            return self
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.per_tensor and self.method in CALIBRATED:
            raise ValueError(f"granularity of {self.method} must be channel or gN, got 'tensor'")
        if self.per_tensor and self.group_size != PER_CHANNEL:
            raise ValueError(f"group_size must be -1 where per_tensor is true, got {self.group_size}")
        QuantSpec(self.bits, self.group_size, self.symmetric)
        return self

    @property
    def is_pattern(self) -> bool:
        """Whether the target names layers rather than a component."""
        return self.target not in (*COMPONENTS, ALL)

    @property
    def spec(self) -> QuantSpec | None:
        """How a selected layer is stored; None where it is left alone."""
        return None if self.bits == LEFT_ALONE else QuantSpec(self.bits, self.group_size, self.symmetric)

    def __str__(self) -> str:
        target = self.target
        if self.blocks != ALL or self.kind != ALL:
            target += "".join(f"/{part}" for part in (self.blocks, self.kind) if part != ALL)
        if self.bits == LEFT_ALONE:
            return f"{target}=16"
        granularity = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        if self.per_tensor:
            granularity = "tensor"
        return f"{target}={self.method}:{self.bits}:{granularity}:{'sym' if self.symmetric else 'asym'}"


class Recipe(BaseModel):
    """An ordered list of rules, later ones overriding earlier ones, and patterns of layers to skip."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[Rule, ...]
    skip: tuple[str, ...] = ()

    @classmethod
    def parse(cls, source: str | Path | dict[str, Any] | list[Any] | Recipe) -> Recipe:
        """A recipe from its one-line form, a YAML or JSON file, or the content of such a file.

        Raises:
            ValueError: one line that names the field, what it must be, the value got and the rule it is in.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, (dict, list)):
            return cls._from_content(source, "recipe")
        text = str(source)
        if isinstance(source, Path) or text.endswith((".yaml", ".yml", ".json")):
            return cls._from_file(Path(source))
        entries = text.split()
        if not entries:
            raise ValueError("recipe must hold at least one rule such as language=gptq:4:g64, got nothing")
        rules, skip = [], []
        for entry in entries:
            target, equals, action = entry.rpartition("=")
            if not equals or not target or not action:
                raise ValueError(f"recipe entries must look like vision=gptq:4:g64, got {entry!r}")
            if target == "skip":
                skip.append(action)
            else:
                rules.append(_rule(entry, target, action))
        return cls(rules=tuple(rules), skip=tuple(skip))

    @classmethod
    def _from_file(cls, path: Path) -> Recipe:
        if not path.is_file():
            raise ValueError(f"recipe file {path} does not exist")
        try:
            content = read_yaml(path)
        except ValueError as error:
            raise ValueError(f"recipe file {path} is no valid {path.suffix[1:]}: {error}") from None
        if isinstance(content, str):
            return cls.parse(content)
        return cls._from_content(content, str(path))

    @classmethod
    def _from_content(cls, content: Any, where: str) -> Recipe:
        if isinstance(content, list):
            content = {"rules": content}
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{where}: {first_message(error)}") from None

    @property
    def methods(self) -> set[str]:
        """Methods that the recipe asks for."""
        return {rule.method for rule in self.rules if rule.method is not None}

    @property
    def calibrated(self) -> bool:
        """Whether it asks for a method that looks at activations."""
        return not self.methods.isdisjoint(CALIBRATED)

    def __str__(self) -> str:
        return " ".join([*(str(rule) for rule in self.rules), *(f"skip={pattern}" for pattern in self.skip)])


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (a glob, or ``re:`` and a regular expression for the whole name) selects a layer."""
    if pattern.startswith("re:"):
        return expression(pattern[3:]).fullmatch(name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _rule(entry: str, target: str, action: str) -> Rule:
    fields: dict[str, Any] = {"target": target}
    if not target.startswith("re:"):
        fields["target"], *selectors = target.split("/")
        for selector in selectors:
            if selector in BLOCK_GROUPS:
                fields["blocks"] = selector
            elif selector in KINDS:
                fields["kind"] = selector
            elif selector != ALL:
                known = ", ".join((*BLOCK_GROUPS, *KINDS, ALL))
                raise ValueError(f"selector must be one of {known}, got {selector!r} ({entry})")
    if action == str(LEFT_ALONE):
        fields["bits"] = LEFT_ALONE
    else:
        method, *options = action.split(":")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r} ({entry})")
        if not options:
            raise ValueError(f"bits must follow the method, as in {method}:4, got {action!r} ({entry})")
        if options[0] == str(LEFT_ALONE):
            fields["bits"] = LEFT_ALONE
        else:
            fields |= {"method": method, "bits": options[0], "per_tensor": method == "uniform"}
            for option in options[1:]:
                fields |= _option(option, entry)
    try:
        return Rule(**fields)
    except ValidationError as error:
        raise ValueError(f"{first_message(error)} ({entry})") from None


def _option(option: str, entry: str) -> dict[str, Any]:
    if option in ("sym", "asym"):
        return {"symmetric": option == "sym"}
    if option == "tensor":
        return {"per_tensor": True, "group_size": PER_CHANNEL}
    if option == "channel":
        return {"per_tensor": False, "group_size": PER_CHANNEL}
    if re.fullmatch(r"g-?\d+", option):
        return {"per_tensor": False, "group_size": int(option[1:])}
    raise ValueError(f"option must be gN, channel, tensor, sym or asym, got {option!r} ({entry})")


def first_message(error: ValidationError) -> str:
    """The first complaint of pydantic, as one line in the words of the house."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        return shortened(message, 500)
    return f"{place}: {message[0].lower()}{message[1:]}, got {shortened(repr(first.get('input')))}"
