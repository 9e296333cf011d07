"""Grids: a model, data, and what is to be varied, in a YAML or JSON file; each point of a grid is a configuration.

    model: Salesforce/blip2-opt-2.7b
    tasks: {caption: data/coco, vqa: {data: data/vqav2, limit: 2000}}
    calibration: {data: ["caption:data/coco", "vqa:data/vqav2"], samples: 128}
    methods: [gptq, awq]
    parts: [vision, connector, language]     # or thirds of them: vision.first
    bits: [2, 3, 4, 16]                      # or by part: {vision: [3, 4], language: 4}
    layers: [both]                           # attention, mlp
    group_size: 128                          # or channel, tensor; a list varies it

All methods of a grid have the same group size, symmetry, bits and calibration, unless `by_method` says otherwise;
`uniform` is one grid a tensor, which is what makes it that. With `together`, parts get one number of bits: a list of
lists of parts, or `thirds` for what the study varied, one component by thirds and the others wholly or not at all.
`recipes` adds configurations of its own. Grids that come with the package (`shipped`) are the study's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmq_kernels.eval import SPLITS, TASKS, EvalOptions
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.quantize import GptqSettings
from mmq_kernels.quantize.recipe import (
    BLOCK_GROUPS,
    COMPONENTS,
    KINDS,
    LEFT_ALONE,
    METHODS,
    Recipe,
    first_message,
)
from mmq_kernels.quantize.untrusted import read_yaml, shortened
from mmq_kernels.spec import BITS

BOTH = "both"
THIRDS = tuple(f"{component}.{third}" for component in COMPONENTS for third in BLOCK_GROUPS)
PARTS = (*COMPONENTS, *THIRDS)

Layers = Literal["both", "attention", "mlp"]
GroupSize = int | Literal["channel", "tensor"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSetting(_Strict):
    """Data of one task: its folder, split, and how many samples of it (None: all, images for retrieval)."""

    data: Path
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)
    captions_per_image: int | None = Field(default=None, ge=1)


class CalibrationSetting(_Strict):
    """What gptq and awq look at: ``TASK:DIR`` entries that share `samples`; the draw's seed is the grid's if None."""

    data: tuple[str, ...]
    samples: int = Field(default=128, ge=1)
    seed: int | None = None


class EvaluationSetting(_Strict):
    """As the options of `mmq eval`."""

    batch_size: int = Field(default=64, ge=1)
    beams: int | None = Field(default=None, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    meteor: bool = True
    top_k: int = Field(default=128, ge=0)
    tokenizer: Literal["auto", "ptb", "plain"] = "auto"

    def options(self) -> EvalOptions:
        return EvalOptions(
            batch_size=self.batch_size,
            num_beams=self.beams,
            max_new_tokens=self.max_new_tokens,
            meteor=self.meteor,
            top_k=self.top_k,
        )


class GptqSetting(_Strict):
    """As the options of `mmq quantize`."""

    damping: float = 0.01
    order: str = "input"
    grid: str = "minmax"
    percentile: float = GptqSettings.percentile
    block_size: int = 128

    @model_validator(mode="after")
    def _valid(self) -> GptqSetting:
        self.settings()
        return self

    def settings(self) -> GptqSettings:
        return GptqSettings(self.damping, self.order, self.grid, self.percentile, self.block_size)


class Setting(_Strict):
    """All that the configurations of a sweep have in common.

    Attributes:
        model: a folder or hub name, not quantized.
        tasks: what each configuration is scored on, by name: a folder, or a `TaskSetting`.
        calibration: needed by gptq, gptq+ and awq.
        seed: of all that is drawn.
        gptq: its options.
        evaluation: how tasks are run.
    """

    model: str
    tasks: dict[str, TaskSetting]
    calibration: CalibrationSetting | None = None
    seed: int = 0
    gptq: GptqSetting = GptqSetting()
    evaluation: EvaluationSetting = EvaluationSetting()

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"tasks must be an object of folders by task, got {shortened(repr(value))}")
        for task in value:
            if task not in TASKS:
                raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        return {
            task: each if isinstance(each, (Mapping, TaskSetting)) else {"data": each} for task, each in value.items()
        }

    @model_validator(mode="after")
    def _fits(self) -> Setting:
        for task, each in self.tasks.items():
            if each.split not in (None, *SPLITS[task]):
                raise ValueError(f"split of task {task} must be one of {', '.join(SPLITS[task])}, got {each.split!r}")
        self.source()
        return self

    def source(self) -> CalibrationSource | None:
        """Where calibration draws from."""
        if self.calibration is None:
            return None
        seed = self.seed if self.calibration.seed is None else self.calibration.seed
        return CalibrationSource.parse(self.calibration.data, self.calibration.samples, seed)


@dataclass(frozen=True)
class Configuration:
    """One point of a grid.

    Attributes:
        method: uniform, rtn, gptq, gptq+, awq; another name for a recipe of several.
        factors: what was varied, for the results: bits by part (16: left alone), `layers`, `group`.
        recipe: in the one-line form; empty where everything is left alone.
    """

    method: str
    factors: Mapping[str, float | str]
    recipe: str

    def __str__(self) -> str:
        return f"{self.method} " + " ".join(f"{name}={value}" for name, value in self.factors.items())


class Granularity(_Strict):
    """Group size and symmetry of one method, where it is not to have those of the grid."""

    group_size: GroupSize | None = None
    symmetric: bool | None = None


class Grid(Setting):
    """A setting and what is varied in it; see the head of this file.

    Attributes:
        description: one line.
        methods, parts, bits, layers, group_size, symmetric, together, by_method, recipes: see above.
        projections: whether `both` layers of a component are also those outside its blocks' attention and mlp.
        variants: by name what to change of the grid, for `variant`.
    """

    description: str = ""
    methods: tuple[str, ...] = ()
    parts: tuple[str, ...] = COMPONENTS
    bits: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    layers: tuple[Layers, ...] = ("both",)
    group_size: tuple[GroupSize, ...] = (128,)
    symmetric: bool = False
    together: tuple[tuple[str, ...], ...] | Literal["thirds"] | None = None
    by_method: dict[str, Granularity] = {}
    projections: bool = True
    recipes: tuple[str, ...] = ()
    variants: dict[str, dict[str, Any]] = {}

    @classmethod
    def read(cls, source: str | Path, variant: str | None = None, **changes: Any) -> Grid:
        """A grid from a file, or a shipped one by name.

        Args:
            variant: of those that the grid has.
            changes: fields to have instead of the file's.

        Raises:
            ValueError: one line that names the file, the field, what it must be and the value got.
        """
        path = Path(source)
        if path.suffix not in (".yaml", ".yml", ".json"):
            if str(source) not in shipped():
                raise ValueError(
                    f"grid must be a YAML or JSON file or one of {', '.join(shipped())}, got {str(source)!r}"
                )
            path = shipped()[str(source)]
        if not path.is_file():
            raise ValueError(f"grid file {path} does not exist")
        try:
            content = read_yaml(path)
        except ValueError as error:
            raise ValueError(f"grid file {path} is no valid {path.suffix[1:]}: {error}") from None
        return cls.of(content, variant, where=str(path), **changes)

    @classmethod
    def of(cls, content: Any, variant: str | None = None, *, where: str = "grid", **changes: Any) -> Grid:
        """A grid from the content of a file; see `read`."""
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: a grid must be an object, got {shortened(repr(content))}")
        content = dict(content)
        if variant is not None:
            variants = content.get("variants") or {}
            if not isinstance(variants, Mapping) or not isinstance(variants.get(variant), Mapping):
                raise ValueError(f"{where}: variant must be one of {', '.join(variants) or 'none'}, got {variant!r}")
            content |= variants[variant]
        content |= {name: value for name, value in changes.items() if value is not None}
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{where}: {first_message(error)}") from None

    @field_validator("methods", "layers", "group_size", "parts", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else (value,)

    @field_validator("bits", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {part: _widths(each, f"bits of {part}") for part, each in value.items()}
        return _widths(value, "bits")

    @field_validator("recipes")
    @classmethod
    def _recipes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for recipe in value:
            Recipe.parse(recipe)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        for method in (*self.methods, *self.by_method):
            if method not in METHODS:
                raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        named = set(self.bits) if isinstance(self.bits, dict) else set(self.parts)
        groups = () if self.together is None or self.together == "thirds" else self.together
        for part in (*named, *(part for group in groups for part in group)):
            if part not in PARTS:
                raise ValueError(f"part must be one of {', '.join(COMPONENTS)} or such as {THIRDS[0]}, got {part!r}")
            if part in THIRDS and part.split(".")[0] in named:
                raise ValueError(f"part {part} is in {part.split('.')[0]}, which is varied too")
        if self.together is not None and isinstance(self.bits, dict):
            raise ValueError("bits must be a list where parts are varied together, got an object")
        if not self.recipes and not (self.methods and self.bits):
            raise ValueError("a grid must have methods and bits, or recipes")
        for _ in self.configurations():  # whatever a recipe refuses is refused here
            pass
        return self

    def configurations(self) -> list[Configuration]:
        """Every point once, in the order of methods, group sizes, layers, and bits."""
        found: dict[tuple[Any, ...], Configuration] = {}
        for each in (*self._points(), *(_of_recipe(recipe) for recipe in self.recipes)):
            found.setdefault((each.method, *each.factors.items()), each)
        return list(found.values())

    def _points(self) -> Iterator[Configuration]:
        for method in self.methods if self.bits else ():
            own = self.by_method.get(method, Granularity())
            sizes = self.group_size
            if own.group_size is not None or method == "uniform":
                sizes = (own.group_size or "tensor",)
            symmetric = self.symmetric if own.symmetric is None else own.symmetric
            for size, layers, widths in itertools.product(sizes, self.layers, self._widths()):
                touched = any(bits != LEFT_ALONE for bits in widths.values())
                factors: dict[str, float | str] = dict(widths)
                if len(self.layers) > 1 or self.layers[0] != BOTH:
                    factors["layers"] = layers if touched else BOTH
                if len(self.group_size) > 1:
                    factors["group"] = size
                recipe = " ".join(self._entries(method, widths, layers, size, symmetric))
                if recipe:
                    Recipe.parse(recipe)
                yield Configuration(method, factors, recipe)

    def _widths(self) -> Iterator[dict[str, int]]:
        """Bits by part."""
        if self.together is not None:
            assert not isinstance(self.bits, dict)
            groups = _by_thirds() if self.together == "thirds" else self.together
            parts = THIRDS if self.together == "thirds" else tuple(dict.fromkeys(p for group in groups for p in group))
            for bits, group in itertools.product(self.bits, groups):
                yield {part: bits if part in group else LEFT_ALONE for part in parts}
            return
        by_part = self.bits if isinstance(self.bits, dict) else dict.fromkeys(self.parts, self.bits)
        for chosen in itertools.product(*by_part.values()):
            yield dict(zip(by_part, chosen, strict=True))

    def _entries(
        self, method: str, widths: Mapping[str, int], layers: str, size: GroupSize, symmetric: bool
    ) -> Iterator[str]:
        granularity = f"g{size}" if isinstance(size, int) else size
        if size == -1:
            granularity = "channel"
        kinds: Sequence[str] = ("",) if layers == BOTH else (f"/{layers}",)
        if layers == BOTH and not self.projections:
            kinds = [f"/{kind}" for kind in KINDS]
        for component, parts in _whole(widths).items():
            for (part, bits), kind in itertools.product(parts.items(), kinds):
                if bits != LEFT_ALONE:
                    target = part.replace(".", "/") if part in THIRDS else component
                    yield f"{target}{kind}={method}:{bits}:{granularity}:{'sym' if symmetric else 'asym'}"


def _widths(value: Any, what: str) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for bits in values:
        if type(bits) is not int or bits not in (*BITS, LEFT_ALONE):
            raise ValueError(f"{what} must be integers from 2 to 8, or 16, got {bits!r}")
    return values


def _whole(widths: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Parts by component, a component whose thirds have one width as one part: its projections go with it then."""
    found: dict[str, dict[str, int]] = {}
    for component in COMPONENTS:
        own = {part: bits for part, bits in widths.items() if part.split(".")[0] == component}
        if len(own) == len(BLOCK_GROUPS) and len(set(own.values())) == 1:
            own = {component: next(iter(own.values()))}
        if own:
            found[component] = own
    return found


def _by_thirds() -> list[tuple[str, ...]]:
    """One component by any of its thirds, the others wholly or not at all: 79 ways, as in the study's tables."""
    found: dict[tuple[str, ...], None] = {}
    for varied in COMPONENTS:
        for own in itertools.product((False, True), repeat=len(BLOCK_GROUPS)):
            for others in itertools.product((False, True), repeat=len(COMPONENTS) - 1):
                whole = dict(zip([c for c in COMPONENTS if c != varied], others, strict=True))
                touched = tuple(
                    part
                    for part in THIRDS
                    for component, third in [part.split(".")]
                    if (own[BLOCK_GROUPS.index(third)] if component == varied else whole[component])
                )
                if touched:
                    found[touched] = None
    return list(found)


def _of_recipe(recipe: str) -> Configuration:
    """A recipe given as such; its factors are the bits of whole components, where all its rules are of that kind."""
    parsed = Recipe.parse(recipe)
    methods = sorted(parsed.methods)
    plain = all(rule.target in COMPONENTS and rule.blocks == rule.kind == "all" for rule in parsed.rules)
    factors: dict[str, float | str] = {"recipe": str(parsed)}
    if plain and not parsed.skip:
        given = {rule.target: rule.bits for rule in parsed.rules}
        factors = {component: given.get(component, LEFT_ALONE) for component in COMPONENTS}
    return Configuration(methods[0] if len(methods) == 1 else "+".join(methods) or "none", factors, str(parsed))


def shipped() -> dict[str, Path]:
    """Grids that come with the package, by name."""
    folder = Path(str(resources.files("mmq_kernels.sweep") / "grids"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
