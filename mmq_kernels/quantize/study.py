"""The configuration files of the study (arXiv 2601.15287), read as they are, into recipes.

Three kinds are told apart by their form:

* uniform: a list of ``{"model_part", "layer_group", "layer_type", "num_bits"}``: per-tensor min-max; may be empty.
* GPTQ: ``{"vision" | "qformer" | "language": {"bits", "percent_dampening", "group_size", ...}}``.
* AWQ: ``{"vit_layers" | "qformer_layers" | "llm_layers": {group of modules: bits}}``, group 128, asymmetric.

16 bits leave layers alone. The study quantizes the linears of blocks, attention and MLP; projections between the parts
and output heads stay as they are. Trailing commas, which one of its generators writes, are taken for what they mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mmq_kernels.quantize.recipe import KINDS, LEFT_ALONE, Recipe, Rule, first_message
from mmq_kernels.quantize.settings import GptqSettings
from mmq_kernels.quantize.untrusted import read_yaml, shortened

AWQ_GROUP_SIZE = 128

_PARTS = {"VIT": "vision", "QFORMER": "connector", "LLM": "language"}
_GPTQ_PARTS = {"vision": "vision", "qformer": "connector", "language": "language"}

_AWQ_PARTS: dict[str, dict[str, str]] = {
    "vit_layers": {
        "self_attn": r"re:vision_model\..*\.self_attn\.qkv",
        "self_attn_output": r"re:vision_model\..*\.self_attn\.projection",
        "fc1": r"re:vision_model\..*\.fc1",
        "fc2": r"re:vision_model\..*\.fc2",
    },
    "qformer_layers": {
        "self_attn": r"re:qformer\..*\.attention\.attention\.(query|key|value)",
        "self_attn_output": r"re:qformer\..*\.\d+\.attention\.output\.dense",
        "cross_attn": r"re:qformer\..*\.crossattention\.attention\.(query|key|value)",
        "cross_attn_output": r"re:qformer\..*\.crossattention\.output\.dense",
        "intermediate_txt": r"re:qformer\..*\.intermediate\.dense",
        "output_txt": r"re:qformer\..*\.\d+\.output\.dense",
        "intermediate_query": r"re:qformer\..*\.intermediate_query\.dense",
        "output_query": r"re:qformer\..*\.output_query\.dense",
    },
    "llm_layers": {
        "self_attn": r"re:language_model\..*\.(q_proj|k_proj|v_proj|q|k|v)",
        "self_attn_output": r"re:language_model\..*\.(out_proj|o)",
        "fc1": r"re:language_model\..*\.(fc1|wi|wi_0|wi_1)",
        "fc2": r"re:language_model\..*\.(fc2|wo)",
    },
}
"""Groups of modules as the study names them -> names of BLIP-2's layers in transformers."""


class _Uniform(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model_part: Literal["VIT", "QFORMER", "LLM"]
    layer_group: Literal["FIRST", "MIDDLE", "LAST", "ALL"]
    layer_type: Literal["MLP", "ATTENTION", "BOTH"]
    num_bits: int


class _Gptq(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int
    percent_dampening: float = 0.01
    group_size: int = -1
    use_symmetric: bool = True
    use_act_order: bool = False
    use_static_groups: bool = False


def read_study_config(path: str | Path) -> tuple[Recipe, GptqSettings]:
    """A recipe and GPTQ's settings from one of the study's files.

    Raises:
        ValueError: naming the file, the field, what it must be and the value got.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"configuration file {path} does not exist")
    try:
        content = read_yaml(path)  # JSON is YAML, and YAML lets a comma trail
    except ValueError as error:
        raise ValueError(f"configuration file {path} is no valid JSON: {error}") from None
    try:
        return study_recipe(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {first_message(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def study_recipe(content: Any) -> tuple[Recipe, GptqSettings]:
    """The same from the content of a file.

    Raises:
        ValueError: naming the field, what it must be and the value got.
    """
    settings = GptqSettings()
    if isinstance(content, list):
        rules = list(_uniform(content))
    elif isinstance(content, dict) and content and content.keys() <= _GPTQ_PARTS.keys():
        parsed = {part: _Gptq.model_validate(values) for part, values in content.items()}
        rules, settings = list(_gptq(parsed)), _settings(parsed)
    elif isinstance(content, dict) and content and content.keys() <= _AWQ_PARTS.keys():
        rules = list(_awq(content))
    else:
        got = shortened(", ".join(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"a configuration must be a list, or an object with the keys {', '.join(_GPTQ_PARTS)} (GPTQ) or "
            f"{', '.join(_AWQ_PARTS)} (AWQ), got {got or 'nothing'}"
        )
    return Recipe(rules=tuple(rules)), settings


def _uniform(entries: Iterable[Any]) -> Iterator[Rule]:
    for entry in entries:
        found = _Uniform.model_validate(entry)
        kinds = KINDS if found.layer_type == "BOTH" else (found.layer_type.lower(),)
        for kind in kinds:
            place = {"target": _PARTS[found.model_part], "blocks": found.layer_group.lower(), "kind": kind}
            yield _rule(place, "uniform", found.num_bits, per_tensor=True)


def _gptq(parts: dict[str, _Gptq]) -> Iterator[Rule]:
    for part, found in parts.items():
        for kind in KINDS:
            place = {"target": _GPTQ_PARTS[part], "kind": kind}
            yield _rule(place, "gptq", found.bits, group_size=found.group_size, symmetric=found.use_symmetric)


def _settings(parts: dict[str, _Gptq]) -> GptqSettings:
    """What holds for the whole run must be the same in all of its parts."""
    for part, found in parts.items():
        if found.use_static_groups and not found.use_act_order:
            raise ValueError(f"{part}.use_static_groups must be false where use_act_order is, got true")
    for field in ("percent_dampening", "use_act_order", "use_static_groups"):
        values = {getattr(found, field) for found in parts.values()}
        if len(values) > 1:
            raise ValueError(f"{field} must be the same for all parts, got {', '.join(map(str, sorted(values)))}")
    first = next(iter(parts.values()))
    ordered = "static" if first.use_static_groups else "activation"
    return GptqSettings(first.percent_dampening, ordered if first.use_act_order else "input")


def _awq(parts: dict[str, Any]) -> Iterator[Rule]:
    for part, groups in parts.items():
        if not isinstance(groups, dict):
            raise ValueError(f"{part} must be an object of module groups, got {groups!r}")
        known = _AWQ_PARTS[part]
        for group, bits in groups.items():
            if group not in known:
                near = difflib.get_close_matches(str(group), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{part} must have groups of {', '.join(known)}, got {group!r}{hint}")
            if bits != LEFT_ALONE:  # a model need not have what is left alone
                yield _rule({"target": known[group]}, "awq", bits, group_size=AWQ_GROUP_SIZE)


def _rule(place: dict[str, Any], method: str, bits: int, **how: Any) -> Rule:
    if bits == LEFT_ALONE:
        return Rule(**place, bits=bits)
    return Rule(**place, method=method, bits=bits, **how)
