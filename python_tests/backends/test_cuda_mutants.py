"""Each patch in mutants/ breaks the CUDA sources in one place, and must be noticed: this keeps the emulation honest.

A patch's first line says what it breaks; `Bits: N` in it asks for another width than 3.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
from pathlib import Path

import emulation
import mutant_checks
import pytest

HERE = Path(__file__).parent
MUTANTS = sorted((HERE / "mutants").glob("*.patch"))
REASON = emulation.why_not() or (None if shutil.which("patch") else "no patch(1)")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no emulation: {REASON}")


SECONDS = 240


@pytest.fixture(scope="session")
def processes() -> multiprocessing.context.ForkServerContext:
    """Where a process that checks a mutant comes from: one that has imported torch already, and nothing emulated."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", "mmq_kernels.backends.cuda"])
    return context


def outcome(processes, root: Path, bits: int, log: Path) -> tuple[int | None, str]:
    """Exit code of the checks of the sources in a folder, and what they say."""
    module = emulation.build(root, [bits])
    process = processes.Process(target=mutant_checks.outcome, args=(module, bits, log))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, f"not done after {SECONDS} s"
    return process.exitcode, log.read_text() if log.exists() else ""


@pytest.mark.parametrize("bits", [3, 8])
def test_the_sources_as_they_are_pass(bits, processes, tmp_path) -> None:
    assert outcome(processes, emulation.CSRC, bits, tmp_path / "log") == (0, "")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda path: path.stem)
def test_mutant_is_noticed(mutant, processes, tmp_path) -> None:
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
    code, said = outcome(processes, root, int(asked.group(1)) if asked else 3, tmp_path / "log")
    assert code == mutant_checks.CAUGHT, f"{mutant.name}: exit {code}, {said}"


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
        "cuda/descend.cu",
    }
