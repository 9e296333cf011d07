"""Names of folders from before a model class was rearranged -> the names the class has now.

Public folders of LLaVA, Qwen2-VL, Gemma 3 and others keep the names of their first release (``language_model.model.
layers``), and transformers renames them as it loads (to ``model.language_model.layers``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def names_in_model(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What each tensor of a folder is called in the model; its own name where the model has such a module.

    Args:
        names: of tensors, with the module they belong to.
    """
    modules = {name for name, _ in model.named_modules()}
    rename = _renaming(model)
    return {name: name if name.rpartition(".")[0] in modules else rename(name) for name in names}


def _renaming(model: Any) -> Callable[[str], str]:
    """How this version of transformers renames: by a list of transforms in 5, by a table of expressions in 4."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        table: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", {})
        return lambda name: _first_substituted(table, name)
    steps = [step for step in get_model_conversion_mapping(model, add_legacy=False) if isinstance(step, WeightRenaming)]

    def rename(name: str) -> str:
        for step in steps:
            name, _ = step.rename_source_key(name)
        return name

    return rename


def _first_substituted(table: dict[str, str], name: str) -> str:
    for pattern, replacement in table.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name
