"""Names of tensors in files and in models: transformers moves modules, and reads older files under their old names."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import nn

from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.checkpoint.skeleton import places
from mmq_kernels.nn.on_disk import ON_DISK

Rename = Callable[[str], str]


class Names:
    """Where the tensors and layers that a folder names are in `model`, whose linears are not packed yet.

    A name is looked for as it is, then as this transformers renames it on loading, each with and without the prefix of
    the base model: so a base model finds its part of a whole one's file, and the other way round.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rules = list(_rules(model))
        prefix = getattr(model, "base_model_prefix", "")
        self._prefix = f"{prefix}." if prefix else ""
        self._linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._tensors = {f"{name}.{own}" for name in self._linears for own in ON_DISK} | places(model).keys()

    def layer(self, name: str) -> str | None:
        """The linear's name in the model; None where it has none."""
        return self._find(name, self._linears)

    def tensor(self, name: str) -> str | None:
        """The tensor's name in the model, for a packed one under its layer; None where it has no place."""
        return self._find(name, self._tensors)

    def rename(self, folder: Folder) -> None:
        """Give the tensors of a folder the names that they have in the model; others keep theirs."""
        found = {name: self.tensor(name) or name for name in folder}
        folder.rename({name: new for name, new in found.items() if new not in folder.entries})

    def _find(self, name: str, among: Container[str]) -> str | None:
        return next((found for found in self._candidates(name) if found in among), None)

    def _candidates(self, name: str) -> Iterator[str]:
        renamed = name
        for rule in self._rules:
            renamed = rule(renamed)
        for found in dict.fromkeys((name, renamed)):
            yield found
            if self._prefix:
                yield found.removeprefix(self._prefix)
                yield self._prefix + found


def _rules(model: nn.Module) -> Iterator[Rename]:
    """How transformers renames what it loads: rules that chain in its version 5, of which the first holds in 4."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        patterns: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", {})
        yield lambda name: _first_match(patterns, name)
        return
    transforms: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    for transform in transforms:
        if isinstance(transform, WeightRenaming):
            yield lambda name, rename=transform.rename_source_key: rename(name)[0]  # type: ignore[misc]


def _first_match(patterns: dict[str, str], name: str) -> str:
    for pattern, replacement in patterns.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
