"""The suites of the Triton backend in processes of their own, where Triton's interpreter runs its kernels on the CPU.

Triton decides when it is imported whether kernels are compiled or interpreted, so one process cannot do both.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SUITES = {
    "matrix, first half": ("ops/test_matrix.py", "triton and (exact or rtn or pack or rows or same)"),
    "matrix, second half": ("ops/test_matrix.py", "triton and not (exact or rtn or pack or rows or same)"),
    "ops": ("ops/test_ops.py", "triton"),
    "kernels": ("backends/test_triton_kernels.py", "triton"),
}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs the interpreter's process itself"),
]


@pytest.mark.parametrize("suite", SUITES)
def test_suite_passes_in_the_interpreter(suite) -> None:
    path, chosen = SUITES[suite]
    command = [sys.executable, "-m", "pytest", str(TESTS / path), "-k", chosen, "-q", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=290)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    closing = done.stdout.strip().splitlines()[-1]
    assert " passed" in closing and "skipped" not in closing, closing
