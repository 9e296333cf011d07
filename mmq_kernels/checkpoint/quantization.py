"""`quantize_checkpoint`: from a model's folder to a folder of packed weights, streaming where the recipe allows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig

from mmq_kernels import __version__
from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.folder import check_target, disk_bytes, read_config
from mmq_kernels.checkpoint.format import KEY, describe, stored_layers
from mmq_kernels.checkpoint.loading import (
    chosen_dtype,
    fetched,
    load,
    load_processor,
    read_generation_config,
)
from mmq_kernels.checkpoint.partial import PartialRun
from mmq_kernels.checkpoint.saving import save
from mmq_kernels.checkpoint.shards import Folder
from mmq_kernels.checkpoint.streamed import Streamed, Unfit
from mmq_kernels.checkpoint.streaming import SHARD_BYTES, quantize_folder
from mmq_kernels.models import QuantizationReport, quantization
from mmq_kernels.nn import QuantLinear
from mmq_kernels.quantize import GptqSettings, Recipe
from mmq_kernels.quantize.sequential import Batch, Hold, Progress, in_memory


class Calibration(Protocol):
    """Where the batches come from; `mmq_kernels.eval.calibration` has the real one."""

    def fingerprint(self) -> str:
        """Equal for equal batches."""

    def batches(self, model: Any, processor: Any) -> Sequence[Batch]:
        """Keyword arguments for calls of `model`."""


def quantize_model(
    model: Any, recipe: Recipe | str, batches: Iterable[Batch] = (), **options: Any
) -> QuantizationReport:
    """`mmq_kernels.models.quantize_model`, after which the model's config says what it holds.

    So the model's own `save_pretrained` writes a folder that loads.
    """
    report = quantization.quantize_model(model, recipe, batches, **options)
    model.config.quantization_config = describe(stored_layers(model), report.recipe).model_dump()
    return report


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

    A recipe of uniform and rtn alone streams through the tensors. With gptq or awq, blocks are read, quantized and let
    go of one after the other, and each is kept in ``OUT.partial`` until the checkpoint stands. So neither holds the
    model.

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
    source = fetched(source)
    if not recipe.calibrated:
        report = quantize_folder(source, out, recipe, progress=progress)
    else:
        device = torch.device(device)
        report = _quantize_calibrated(source, recipe, Path(out), calibration, settings, resume, device, progress)
    return {**report, "source_bytes": disk_bytes(source), "disk_bytes": disk_bytes(out)}


def _quantize_calibrated(
    source: Path,
    recipe: Recipe,
    out: Path,
    calibration: Calibration | None,
    settings: GptqSettings,
    resume: bool,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, Any]:
    if recipe.calibrated and calibration is None:
        raise ValueError(f"gptq needs calibration data, got none ({recipe}); see --calibrate")
    processor = load_processor(source)
    streamed = _streamed(source, device)
    model: Any = streamed.model if streamed else load(source, device=device)
    batches = calibration.batches(model, processor) if calibration else ()
    identity = {
        "model": _identity(source),
        "recipe": str(recipe),
        "settings": str(settings),
        "calibration": calibration.fingerprint() if calibration else "none",
        "package": __version__,
    }
    run = PartialRun(out, identity, resume=resume)
    if streamed:
        streamed.finished = run.load
    hold: Hold = streamed.hold if streamed else in_memory
    report = quantization.quantize_model(
        model, recipe, batches, settings=settings, store=run, hold=hold, progress=progress
    )
    hold = _in_stored_dtypes(model, source, streamed)
    save(model, out, recipe=str(recipe), source=source, hold=hold, max_shard_bytes=SHARD_BYTES)
    run.remove()
    return report.to_json()


def _streamed(path: Path, device: torch.device) -> Streamed | None:
    """The model block by block; None where the folder has it in another form than it runs in: it has to be loaded."""
    content = read_config(path)
    if KEY in content:
        raise CheckpointError(f"{path} is quantized already; give the unquantized model")
    try:
        streamed = Streamed(path, device, chosen_dtype(content.get("dtype", content.get("torch_dtype")), device, None))
    except Unfit:
        return None
    read_generation_config(streamed.model, path)
    return streamed


def _in_stored_dtypes(model: Any, source: Path, streamed: Streamed | None) -> Hold:
    """Holds modules with every parameter in the dtype it has in `source`: on the CPU, fp16 is computed in fp32.

    Exact: what was left alone holds values of that dtype, and a packed layer keeps its codes and scales.
    """
    entries = (streamed.folder if streamed else Folder(source)).entries
    default = AutoConfig.from_pretrained(source).dtype or model.dtype
    stored = {
        id(parameter): entries[name].dtype  # a tied parameter has two names and is stored under one
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in entries
    }

    @contextmanager
    def hold(name: str) -> Iterator[None]:
        with streamed.hold(name) if streamed else nullcontext():
            module = model.get_submodule(name)
            if isinstance(module, QuantLinear):
                entry = entries.get(f"{name}.weight")
                module.to(entry.dtype if entry else default)
            else:
                for own, parameter in module.named_parameters(recurse=False):
                    if parameter.is_floating_point() and parameter.device.type != "meta":
                        entry = entries.get(f"{name}.{own}" if name else own)
                        dtype = entry.dtype if entry else stored.get(id(parameter), default)
                        parameter.data = parameter.data.to(dtype)
            yield

    return hold


def _identity(folder: Path) -> str:
    """Equal for the same weights: names and sizes of the files, and their headers."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16]
