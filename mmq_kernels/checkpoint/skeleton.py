"""Models without memory: real buffers, parameters on the meta device, and which parameters are one and the same."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from mmq_kernels.checkpoint.errors import CheckpointError, shortened
from mmq_kernels.checkpoint.folder import CONFIG, read_config
from mmq_kernels.checkpoint.format import KEY
from mmq_kernels.nn import parameters_on_meta

MOST_LAYERS = 10_000
"""Of any part of a model."""

_DERIVED = (r"(^|\.)position_ids$", r"rotary_emb\.inv_freq$")
"""Buffers that models compute themselves, and that older writers stored."""


def architecture(content: dict[str, Any], where: str) -> type[nn.Module]:
    """The transformers class that config.json names.

    Raises:
        CheckpointError: where it names none, or one that this transformers lacks.
    """
    names = content.get("architectures")
    if names is None and isinstance(content.get("text_config"), dict):  # where transformers 4 puts that of Qwen2-VL
        names = content["text_config"].get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{where}: architectures must name a model class of transformers {transformers.__version__}, got {names!r}"
        )
    return found


def build_skeleton(folder: Path) -> nn.Module:
    """The model that `config.json` describes: parameters on meta, buffers real, tied parameters one object.

    Raises:
        CheckpointError: for a config that is missing, damaged or of an unknown class.
    """
    content = read_config(folder)
    where = str(folder / CONFIG)
    model_class: Any = architecture(content, where)
    _check_depth(content, where)
    try:
        config = AutoConfig.from_pretrained(folder)
        config.__dict__.pop(KEY, None)
        with parameters_on_meta(), _default_dtype(config.dtype or torch.float32):
            model = model_class(config)
    except Exception as error:  # whatever a class makes of values that it never expected
        raise CheckpointError(f"{where} does not describe a {model_class.__name__}: {_first_line(error)}") from error
    return model.eval().requires_grad_(False)


def _check_depth(content: Any, where: str) -> None:
    """Refuse to build models of so many layers that it would never end."""
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, int) and value > MOST_LAYERS and re.search("layer|depth|block", str(key)):
                raise CheckpointError(f"{where}: {key} must be at most {MOST_LAYERS}, got {shortened(repr(value))}")
            _check_depth(value, where)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def places(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name, a tied one under all its names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[start + name] = buffer
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another parameter too, and the name under which a checkpoint holds it.

    Of several names, the one that transformers does not list as tied is kept; failing that, the first.
    """
    shared: dict[int, list[str]] = {}
    for name, tensor in places(model).items():
        shared.setdefault(id(tensor), []).append(name)
    aliases: dict[str, str] = {}
    for names in shared.values():
        if len(names) > 1:
            kept = next((name for name in names if not _listed_as_tied(model, name)), names[0])
            aliases |= {name: kept for name in names if name != kept}
    return aliases


def _listed_as_tied(model: nn.Module, name: str) -> bool:
    """Whether transformers says so: `{target: source}` in its version 5, a list of patterns in version 4."""
    keys: Any = getattr(model, "all_tied_weights_keys", None)
    if keys is None:
        keys = getattr(model, "_tied_weights_keys", None) or ()
        return any(re.search(pattern, name) for pattern in keys)
    return name in keys


def is_derived(model: nn.Module, name: str) -> bool:
    """Whether a checkpoint may hold a tensor that the model does not want: it computes it, or says it ignores it."""
    patterns: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in (*_DERIVED, *patterns))


def _first_line(error: Exception) -> str:
    return shortened(next(iter(str(error).strip().splitlines()), type(error).__name__))
