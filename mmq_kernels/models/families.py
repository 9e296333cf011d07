"""The table of model families: where the blocks of each component are, in the order in which they run.

A path names a list of blocks, or one linear of its own. Both the transformers 4 and 5 names of a family are listed;
those that a model has are used. Adding a family is adding an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ATTENTION_PARTS = frozenset(
    {"self_attn", "attention", "crossattention", "attn", "SelfAttention", "EncDecAttention", "encoder_attn"}
)
"""A linear with one of these in its name inside its block belongs to attention, any other to an MLP."""


@dataclass(frozen=True)
class StagePath:
    """A list of blocks, or a single linear, of one component.

    Attributes:
        component: vision, connector or language.
        path: of the module in the model.
        once: whether a forward of the model goes through it once.
    """

    component: str
    path: str
    once: bool = True


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        model_type: as in its config.
        classes: names of its transformers classes.
        stages: in the order in which they run.
        parts: for each component the prefixes of all its parameters, whether quantized or not.
        left_alone: linears that a recipe reaches only by a pattern, and why.
    """

    model_type: str
    classes: tuple[str, ...]
    stages: tuple[StagePath, ...]
    parts: dict[str, tuple[str, ...]]
    left_alone: dict[str, str]


_BLIP2_GENERATION = Family(
    model_type="blip-2",
    classes=("Blip2ForConditionalGeneration",),
    stages=(
        StagePath("vision", "vision_model.encoder.layers"),
        StagePath("connector", "qformer.encoder.layer"),
        StagePath("connector", "language_projection"),
        StagePath("language", "language_model.model.decoder.layers"),
        StagePath("language", "language_model.encoder.block"),
        StagePath("language", "language_model.decoder.block"),
    ),
    parts={
        "vision": ("vision_model",),
        "connector": ("query_tokens", "qformer", "language_projection"),
        "language": ("language_model",),
    },
    left_alone={"language_model.lm_head": "output head: often tied to the embedding, and read by every answer"},
)

_BLIP2_RETRIEVAL = Family(
    model_type="blip-2",
    classes=("Blip2ForImageTextRetrieval",),
    stages=(
        StagePath("vision", "vision_model.encoder.layers"),
        # Images and texts pass through the Q-Former one after the other.
        StagePath("connector", "qformer.encoder.layer", once=False),
        StagePath("connector", "vision_projection"),
        StagePath("connector", "text_projection"),
    ),
    parts={
        "vision": ("vision_model",),
        "connector": (
            "query_tokens",
            "embeddings",
            "qformer",
            "vision_projection",
            "text_projection",
            "itm_head",
        ),
    },
    left_alone={"itm_head": "output head of two classes"},
)

FAMILIES = (_BLIP2_GENERATION, _BLIP2_RETRIEVAL)


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model.

    Raises:
        ValueError: for a class that no family lists.
    """
    name = type(model).__name__
    for family in FAMILIES:
        if name in family.classes:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise ValueError(f"models of class {name} are not supported; supported: {known}")


def component_prefixes(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each component of a model the prefixes of its parameters' names."""
    return dict(family_of(model).parts)


def layer_kind(name_in_block: str) -> str:
    """ "attention" or "mlp", from a linear's name inside its block."""
    return "attention" if ATTENTION_PARTS & set(name_in_block.split(".")) else "mlp"
