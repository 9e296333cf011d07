"""What every benchmark does with its results: a JSON line each, beside the facts without which it is worth nothing."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import mmq_kernels
from mmq_kernels import _native

Row = dict[str, Any]
"""One line of results."""


def provenance() -> Row:
    """Machine, versions, commit and command of this process; call it before the work, for the load it finds."""
    native = _native.available()
    return {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "isa": _native.isa() if native else None,
        "compiler": _native.build_info()["compiler"] if native else None,
        **_gpu(),
        "mmq_kernels": mmq_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "command": _command(),
        "date": time.strftime("%Y-%m-%d"),
    }


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add one line a row to `path`, each as soon as it is there: a run that is killed keeps what it found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")
            lines.flush()


def read(path: Path) -> list[Row]:
    """The lines of a results file.

    Raises:
        ValueError: naming the line that is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"every line of {path} must be a JSON object, got {line[:40]!r} in line {number}")
        rows.append(row)
    return rows


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _gpu() -> Row:
    """The current GPU, the driver, and the CUDA that torch was built with; nothing where torch sees no GPU."""
    if not torch.cuda.is_available():
        return {}
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": about.name,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "multiprocessors": about.multi_processor_count,
    }


def _driver() -> str | None:
    """Version of the NVIDIA driver, such as "550.54.15"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return next(iter(_printed(command, Path.cwd()).splitlines()), None)


def _commit() -> str | None:
    """The commit of the checkout that this package is run from; for a copy without one what ``MMQ_COMMIT`` says.

    "-dirty" follows where something else than results, such as the lines just appended, is not committed.
    """
    checkout = Path(mmq_kernels.__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return os.environ.get("MMQ_COMMIT")
    commit = _printed(["git", "describe", "--always"], checkout)
    changed = _printed(["git", "status", "--porcelain", "--untracked-files=no", ":!benchmarks/results"], checkout)
    return f"{commit}-dirty" if commit and changed else commit or None


def _printed(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _command() -> str:
    """The command line, with a script named from the root of the checkout."""
    script = Path(sys.argv[0])
    name = f"python benchmarks/{script.name}" if script.suffix == ".py" else script.name
    return f"{name} {shlex.join(sys.argv[1:])}".strip()
