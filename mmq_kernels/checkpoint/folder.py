"""Folders that appear whole or not at all, and the files in them that are not weights."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoProcessor

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.format import KEY, Description

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.*",
    "additional_chat_templates",
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(folder: str | Path) -> Path:
    """Make sure that a model can be written to `folder`; call it before long work.

    Raises:
        CheckpointError: for a folder that is not empty, a file, or a place that cannot be written.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{folder} is a file; give the name of a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise CheckpointError(f"{folder} exists and is not empty; remove it or give another folder")
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be written, since {above} is no writable folder; give another one")
    return path


@contextlib.contextmanager
def written_beside(folder: str | Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: where writing fails, naming the folder and the remedy.
    """
    path = check_target(folder)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        yield temporary
        _open_to_all(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {one_line(error)}") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _open_to_all(folder: Path) -> None:
    """Give a folder and its files the permissions that new ones have; temporary ones are their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def one_line(error: OSError | SafetensorError) -> str:
    """What went wrong with a file, and the remedy where the disk is full."""
    message = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    full = number in _NO_SPACE or any(f"os error {code})" in message for code in _NO_SPACE)
    return f"{message}; free some space or give a folder on another disk" if full else message


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        CheckpointError: where there is none, or it is no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no model: it has no {CONFIG}; give the folder that holds it")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON ({' '.join(str(error).split())}); copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def write_config(folder: Path, model: nn.Module, dtype: str, description: Description) -> None:
    """`config.json` and, for models that generate, `generation_config.json`."""
    config: Any = model.config
    config.save_pretrained(folder)
    path = folder / CONFIG
    content = json.loads(path.read_text())
    content["architectures"] = [type(model).__name__]
    content["dtype"] = dtype
    content.pop(KEY, None)
    if description.groups:
        content[KEY] = description.model_dump()
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(folder / GENERATION_CONFIG)


def write_processor(folder: Path, processor: Any = None, source: str | Path | None = None) -> None:
    """The files of the processor or tokenizer: of `processor`, else those that `source` (folder, hub name) has."""
    if processor is not None:
        processor.save_pretrained(folder)
    elif source is not None and Path(source).is_dir():
        for pattern in _PROCESSOR_FILES:
            for found in sorted(Path(source).glob(pattern)):
                if found.is_dir():
                    shutil.copytree(found, folder / found.name)
                else:
                    shutil.copyfile(found, folder / found.name)
    elif source is not None:
        AutoProcessor.from_pretrained(source).save_pretrained(folder)


def disk_bytes(folder: str | Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
