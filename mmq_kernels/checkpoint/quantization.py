"""`quantize_checkpoint`: from a model's folder to a folder of packed weights, streaming where the recipe allows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig

from mmq_kernels import __version__
from mmq_kernels.checkpoint.folder import check_target, disk_bytes
from mmq_kernels.checkpoint.loading import load, load_processor, local_folder
from mmq_kernels.checkpoint.partial import PartialRun
from mmq_kernels.checkpoint.saving import save
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.checkpoint.streaming import quantize_folder
from mmq_kernels.models import quantize_model
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import GptqSettings, Recipe
from mmq_kernels.quantize.sequential import Batch, Progress


class Calibration(Protocol):
    """Where the batches come from; `mmq_kernels.eval.calibration` has the real one."""

    def fingerprint(self) -> str:
        """Equal for equal batches."""

    def batches(self, model: Any, processor: Any) -> Sequence[Batch]:
        """Keyword arguments for calls of `model`."""


def quantize_checkpoint(
    source: str | Path,
    recipe: Recipe | str,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    settings: GptqSettings = GptqSettings(),  # noqa: B008 (frozen)
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize the model in `source` and write the checkpoint `out`.

    A recipe of uniform and rtn alone streams through the tensors of a local folder and never holds the model. With
    gptq the model is loaded, and every finished block is kept in ``OUT.partial`` until the checkpoint stands.

    Args:
        source: a folder or a hub name.
        recipe: see `mmq_kernels.quantize.recipe`.
        out: a folder that does not exist or is empty.
        calibration: needed by gptq.
        settings: of GPTQ.
        resume: go on behind the blocks that a killed run left.
        progress: told (done, in all, what).

    Returns:
        recipe, layers, left_alone, source_bytes and disk_bytes.

    Raises:
        ValueError, CheckpointError: for bad input, before anything is written.
    """
    recipe = Recipe.parse(recipe)
    check_target(out)
    if not recipe.calibrated and Path(source).is_dir():
        report = quantize_folder(source, out, recipe, progress=progress)
    else:
        report = _quantize_loaded(source, recipe, Path(out), calibration, settings, resume, device, progress)
    return {**report, "source_bytes": disk_bytes(source), "disk_bytes": disk_bytes(out)}


def _quantize_loaded(
    source: str | Path,
    recipe: Recipe,
    out: Path,
    calibration: Calibration | None,
    settings: GptqSettings,
    resume: bool,
    device: torch.device | str,
    progress: Progress | None,
) -> dict[str, Any]:
    if recipe.calibrated and calibration is None:
        raise ValueError(f"gptq needs calibration data, got none ({recipe}); see --calibrate")
    processor = load_processor(source)
    model: Any = load(source, device=device)
    batches = calibration.batches(model, processor) if calibration else ()
    identity = {
        "model": _identity(source),
        "recipe": str(recipe),
        "settings": str(settings),
        "calibration": calibration.fingerprint() if calibration else "none",
        "package": __version__,
    }
    run = PartialRun(out, identity, resume=resume)
    report = quantize_model(model, recipe, batches, settings=settings, store=run, progress=progress)
    _restore_dtypes(model, source)
    save(model, out, recipe=str(recipe), source=source)
    run.remove()
    return report.to_json()


def _restore_dtypes(model: Any, source: str | Path) -> None:
    """Give every parameter the dtype it is stored with in `source`: on the CPU, fp16 models are computed in fp32.

    Exact: what was left alone holds values of that dtype, and a packed layer keeps its codes and scales.
    """
    folder = local_folder(source)
    entries = Folder(folder).entries if folder else {}
    default = AutoConfig.from_pretrained(source).dtype or model.dtype
    stored = {
        id(parameter): entries[name].dtype  # a tied parameter has two names and is stored under one
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in entries
    }
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            entry = entries.get(f"{name}.weight")
            module.to(entry.dtype if entry else default)
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(stored.get(id(parameter), default))


def _identity(source: str | Path) -> str:
    """Equal for the same weights: names and sizes of the files, and their headers."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16]
