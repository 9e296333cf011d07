"""Each patch in mutants/ breaks the CUDA sources in one place, and must be noticed: this keeps the emulation honest.

A patch's first line says what it breaks; `Bits: N` in it asks for another width than 3.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
from mutant_checks import CAUGHT

HERE = Path(__file__).parent
MUTANTS = sorted((HERE / "mutants").glob("*.patch"))
REASON = emulation.why_not() or (None if shutil.which("patch") else "no patch(1)")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulation: {REASON}")


def outcome(root: Path, bits: int) -> subprocess.CompletedProcess:
    module = emulation.build(root, [bits])
    command = [sys.executable, str(HERE / "mutant_checks.py"), str(module), str(bits)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


@pytest.mark.parametrize("bits", [3, 8])
def test_the_sources_as_they_are_pass(bits) -> None:
    done = outcome(emulation.CSRC, bits)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda path: path.stem)
def test_mutant_is_noticed(mutant, tmp_path) -> None:
    root = tmp_path / "csrc"
    shutil.copytree(emulation.CSRC, root)
    applied = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "-d", str(tmp_path), "-i", str(mutant)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, f"{mutant.name} does not apply any more: {applied.stdout}"
    asked = re.search(r"Bits: (\d)", mutant.read_text())
    done = outcome(root, int(asked.group(1)) if asked else 3)
    assert done.returncode == CAUGHT, f"{mutant.name}: exit {done.returncode}\n{done.stdout}{done.stderr}"


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 25
    touched = {name for path in MUTANTS for name in re.findall(r"^\+\+\+ b/csrc/(\S+)", path.read_text(), re.MULTILINE)}
    assert touched >= {
        "cuda/gemm.cuh",
        "cuda/gemm_tile.cuh",
        "cuda/decode.cuh",
        "cuda/layout.cuh",
        "cuda/convert.cu",
        "cuda/rtn.cu",
        "cuda/gptq.cu",
    }
