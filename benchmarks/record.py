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

RESULTS = Path(__file__).resolve().parent / "results"


def provenance() -> dict[str, Any]:
    """Machine, versions, commit and command of this process; call it before the work, for the load it finds."""
    native = _native.available()
    script = Path(sys.argv[0]).name
    return {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "isa": _native.isa() if native else None,
        "compiler": _native.build_info()["compiler"] if native else None,
        "mmq_kernels": mmq_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "command": f"python benchmarks/{script} {shlex.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add one line a row to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
