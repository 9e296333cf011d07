"""What a result depends on, as digests: the files of the model, the code (the samples: `mmq_kernels.eval.identity`).

A result is that of a recipe on a model (the content of its files), calibrated and scored on samples (their texts, the
names and sizes of their images) with options, by this code. Where it ran, on how many threads and beside which other
configurations is no part of it. The code is the package's version and the content of those of its sources that make
numbers: a changed comment there runs things again, which costs time; a forgotten version number would cost truth.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib import resources
from pathlib import Path

from mmq_kernels import __version__
from mmq_kernels.checkpoint.loading import FILES

NUMBERS = ("quantize", "models", "eval", "checkpoint", "nn", "ops", "backends", "packing.py", "spec.py")
"""Parts of the package on which numbers depend."""

LARGE = 1 << 24
"""Bytes from which on a file's digest is remembered, for as long as its size and time of change stay."""

_CHUNK = 1 << 22


@cache
def code_version() -> str:
    """Of the package."""
    root = Path(str(resources.files("mmq_kernels")))
    digest = hashlib.sha256(__version__.encode())
    for part in NUMBERS:
        path = root / part
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def model_digest(folder: Path) -> str:
    """Equal for folders with the same weights, configs and processor files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {_of_file(path)}\n".encode())
    return digest.hexdigest()[:16]


def _of_file(path: Path) -> str:
    status = path.stat()
    if status.st_size < LARGE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    place = cache_folder() / "digests" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    known = f"{status.st_size} {status.st_mtime_ns} "
    if place.is_file() and place.read_text().startswith(known):
        return place.read_text().removeprefix(known)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    beside.write_text(known + digest.hexdigest())
    os.replace(beside, place)
    return digest.hexdigest()


def cache_folder() -> Path:
    """``$MMQ_CACHE_DIR``, or ``~/.cache/mmq_kernels``."""
    return Path(os.environ.get("MMQ_CACHE_DIR") or Path.home() / ".cache" / "mmq_kernels")
