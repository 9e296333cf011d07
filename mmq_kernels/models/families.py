"""The families of models: which parts a model has, in which order they run, and where their blocks are.

A family is a row of the table: for each part its component and its path. What else quantizing needs to know is read
off the model itself, so that it cannot be wrong for one:

- blocks: the lists of modules that hold linears; a part without such lists (a projector) is one block;
- shared inputs: the layers that are called with the same tensor (`quantize.walk`);
- foldable pairs: the norm or linear whose outputs can be scaled without changing the block (`quantize.folding`);
- tied weights: parameters that are one object (`models.tied`).

A model that no row is written for is read by the names that transformers gives such parts (`discover`): that serves
any language model, any vision transformer, and most vision-language models. Adding a family is adding a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

VISION, CONNECTOR, LANGUAGE = "vision", "connector", "language"


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        component: vision, connector or language.
        path: of a module or parameter in the model with its head on; "" is the whole model. What a longer path names
            belongs to that part alone.
        once: whether a call of the model goes through the part once.
    """

    component: str
    path: str
    once: bool = True


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        model_types: as in the config.
        parts: in the order in which they run.
        left_alone: linears besides the output head that a recipe reaches only by a pattern, and why.
        needs: path of what tells a model of this kind from others of its types.
    """

    model_types: tuple[str, ...]
    parts: tuple[Part, ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    needs: str = ""


@dataclass(frozen=True)
class Blocks:
    """Modules that run one after the other: the blocks of a transformer, or a projector.

    Attributes:
        component: vision, connector or language.
        path: of the list, or of the one module.
        names: of the modules.
        single: whether this is one module rather than a list.
        once: whether a call of the model goes through them once.
    """

    component: str
    path: str
    names: tuple[str, ...]
    single: bool
    once: bool


HEAD = "output head: often tied to the embedding, and read by every answer"


def _projected(vision: str, connector: tuple[str, ...], language: str, *types: str) -> Family:
    """A tower, what translates its patches, and a language model that reads them among its words."""
    connectors = tuple(Part(CONNECTOR, path) for path in connector)
    parts = (Part(VISION, vision), *connectors, Part(LANGUAGE, language), Part(LANGUAGE, "lm_head"))
    return Family(types, parts)


_PROJECTOR = ("model.multi_modal_projector", "model.image_newline")
_MERGERS = ("model.visual.deepstack_merger_list", "model.visual.merger")

FAMILIES = (
    Family(
        ("blip-2",),
        (
            Part(VISION, "vision_model"),
            Part(CONNECTOR, "query_tokens"),
            Part(CONNECTOR, "embeddings"),
            Part(CONNECTOR, "qformer", once=False),  # images and texts pass through it one after the other
            Part(CONNECTOR, "vision_projection"),
            Part(CONNECTOR, "text_projection"),
            Part(CONNECTOR, "itm_head"),
        ),
        {"itm_head": "output head of two classes"},
        needs="itm_head",
    ),
    Family(
        ("blip-2", "instructblip"),
        (
            Part(VISION, "vision_model"),
            Part(CONNECTOR, "query_tokens"),
            Part(CONNECTOR, "qformer"),
            Part(CONNECTOR, "language_projection"),
            Part(LANGUAGE, "language_model"),
        ),
    ),
    _projected(
        "model.vision_tower",
        _PROJECTOR,
        "model.language_model",
        *("llava", "llava_next", "llava_onevision", "paligemma", "gemma3", "internvl"),
    ),
    _projected("model.visual", _MERGERS, "model.language_model", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    _projected("model.vision_model", ("model.connector",), "model.text_model", "idefics3", "smolvlm"),
    _projected("model.vision_model", _PROJECTOR, "model.language_model", "mllama"),
    Family(
        ("clip", "siglip"),
        (
            Part(LANGUAGE, "text_model"),
            Part(VISION, "vision_model"),
            Part(CONNECTOR, "visual_projection"),
            Part(CONNECTOR, "text_projection"),
            *(Part(CONNECTOR, name) for name in ("logit_scale", "logit_bias")),
        ),
    ),
)

_WORDS = {
    CONNECTOR: ("projector", "projection", "connector", "merger", "qformer", "query_tokens", "resampler", "perceiver")
    + ("aligner", "abstractor", "adapter", "logit_", "image_newline", "itm_head"),
    VISION: ("vision", "visual", "image", "vit"),
    LANGUAGE: ("language", "text", "llm", "lm_head"),
}
"""By what the names of modules contain, the first that fits: a `vision_projection` belongs to the connector."""

_ATTENTION = ("attn", "attention")

_WRAPPER = "model."
"""Models without a head have no such module around their parts."""


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model: from the table, or else discovered.

    Raises:
        ValueError: for what is no transformers model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise ValueError(f"models of class {type(model).__name__} are not supported: only those of transformers are")
    for family in FAMILIES:
        if config.model_type in family.model_types and _has(model, family.needs):
            present = tuple(part for one in family.parts if (part := _present(model, one)) is not None)
            if any(part.component == VISION for part in present):
                return replace(family, parts=present, left_alone={**_heads(model), **family.left_alone})
    return discover(model)


def discover(model: nn.Module) -> Family:
    """A family by the names of a model's modules, vision first, then the connector, then the language model."""
    config = getattr(model, "config", None)
    pictures = not hasattr(config, "vocab_size") and (hasattr(config, "image_size") or hasattr(config, "patch_size"))
    rest = VISION if pictures else LANGUAGE
    order = (VISION, CONNECTOR, LANGUAGE)
    found = sorted(dict.fromkeys(_named_parts(model, "", rest)), key=lambda part: order.index(part[0]))
    if len({component for component, _ in found}) < 2:
        found = [(rest, "")]
    parts = tuple(Part(component, path, once=False) for component, path in found)
    return Family((getattr(config, "model_type", ""),), parts, _heads(model))


def blocks_of(model: nn.Module, family: Family) -> list[Blocks]:
    """Where the linears of a model are that rules reach, in the order in which they run."""
    return [blocks for part in family.parts for blocks in _blocks(model, family, part)]


def component_of(family: Family, name: str) -> str | None:
    """The component that a module or parameter belongs to."""
    owners = [part for part in family.parts if _inside(name, part.path)]
    return max(owners, key=lambda part: len(part.path)).component if owners else None


def component_prefixes(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each component of a model the prefixes of its parameters' names; no name has those of two components."""
    family = family_of(model)
    found: dict[str, list[str]] = {}
    for part in family.parts:
        found.setdefault(part.component, [])
    for name in _outermost(model, family, ""):
        component = component_of(family, name)
        if component is not None:
            found[component].append(name)
    return {component: tuple(names) for component, names in found.items() if names}


def layer_kind(name_in_block: str) -> str:
    """ "attention" or "mlp", from a linear's name inside its block."""
    segments = name_in_block.lower().split(".")
    return "attention" if any(word in segment for segment in segments for word in _ATTENTION) else "mlp"


# --- parts ------------------------------------------------------------------------------------------------------------


def _present(model: nn.Module, part: Part) -> Part | None:
    for path in (part.path, part.path.removeprefix(_WRAPPER)):
        if _has(model, path):
            return Part(part.component, path, part.once)
    return None


def _has(model: nn.Module, path: str) -> bool:
    if not path:
        return True
    holder, _, name = path.rpartition(".")
    try:
        return getattr(model.get_submodule(holder), name, None) is not None
    except AttributeError:
        return False


def _heads(model: nn.Module) -> dict[str, str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name: HEAD for name, module in model.named_modules() if head is not None and module is head}


def _named_parts(module: nn.Module, path: str, rest: str) -> Iterator[tuple[str, str]]:
    """Outermost modules whose names say what they are, connectors inside of them, and everything else as `rest`."""
    own = [(name, None) for name, _ in module.named_parameters(recurse=False)]
    for name, child in [*module.named_children(), *own]:
        full = f"{path}.{name}".lstrip(".")
        component = _component_by_name(name)
        if component is not None:
            yield component, full
            if child is not None and component == VISION:
                yield from _connectors_inside(child, full)
        elif child is not None and _any_named(child):
            yield from _named_parts(child, full, rest)
        else:
            yield rest, full


def _connectors_inside(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Connectors right inside a tower, such as Qwen's mergers; a projection deep in its blocks is not one."""
    for name, child in module.named_children():
        if _component_by_name(name) == CONNECTOR and any(isinstance(m, nn.Linear) for m in child.modules()):
            yield CONNECTOR, f"{path}.{name}"


def _any_named(module: nn.Module) -> bool:
    """Whether a module wraps parts, rather than being a list of blocks or a layer of its own."""
    return not isinstance(module, nn.ModuleList) and any(
        _component_by_name(name) is not None and any(True for _ in child.parameters())
        for name, child in module.named_children()
    )


def _component_by_name(name: str) -> str | None:
    for component, words in _WORDS.items():
        if any(word in name.lower() for word in words):
            return component
    return None


# --- blocks -----------------------------------------------------------------------------------------------------------


def _blocks(model: nn.Module, family: Family, part: Part) -> Iterator[Blocks]:
    try:
        module = model.get_submodule(part.path)
    except AttributeError:  # a parameter
        return
    if part.path in family.left_alone:
        return
    lists = list(_lists(module, part.path, family))
    for path, blocks in lists:
        names = tuple(f"{path}.{name}" for name, _ in blocks.named_children())
        yield Blocks(part.component, path, names, single=False, once=part.once)
    if not lists and part.path and _holds_linears(module):
        yield Blocks(part.component, part.path, (part.path,), single=True, once=part.once)


def _lists(module: nn.Module, path: str, family: Family) -> Iterator[tuple[str, nn.ModuleList]]:
    """Outermost lists of modules with linears in a part, but for those in another part."""
    if isinstance(module, nn.ModuleList):
        if _holds_linears(module):
            yield path, module
        return
    others = {part.path for part in family.parts}
    for name, child in module.named_children():
        full = f"{path}.{name}".lstrip(".")
        if full not in others:
            yield from _lists(child, full, family)


def _holds_linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


# --- prefixes ---------------------------------------------------------------------------------------------------------


def _outermost(model: nn.Module, family: Family, path: str) -> Iterator[str]:
    """Names of the outermost modules and parameters that lie in one part entirely."""
    module = model.get_submodule(path)
    names = [name for name, _ in module.named_parameters(recurse=False)]
    names += [name for name, _ in module.named_children()]
    for name in names:
        full = f"{path}.{name}".lstrip(".")
        if any(_inside(part.path, full) and part.path != full for part in family.parts):
            yield from _outermost(model, family, full)
        else:
            yield full


def _inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")
