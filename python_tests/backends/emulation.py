"""Builds csrc/cuda for this machine's CPU (csrc/emulation), and a backend that runs on it.

The kernels' files are compiled with the compiler's hooks at each access of memory (-fsanitize=thread without its
runtime); everything else as usual. Objects are kept under build/emulation, by the content of what they are made of.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmq_kernels.backends import Call
from mmq_kernels.backends.cuda import CudaBackend
from mmq_kernels.spec import BITS

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
STORE = ROOT / "build" / "emulation"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
KERNELS = (
    "-O1 -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-strict-aliasing -ffp-contract=off"
    " -ftrivial-auto-var-init=pattern -Wno-unknown-pragmas -x c++"
)
HOST = "-O2"
COMMON = "-std=c++17 -DMMQ_EMULATE -fPIC -Wall -Wextra -Werror"
POLICIES = {"in order": 0, "reverse": 1, "run-ahead": 2}

_INCLUDE = re.compile(r'^\s*#include "(.+)"', re.MULTILINE)


def why_not() -> str | None:
    """Why the kernels cannot be emulated on this machine, or None."""
    if COMPILER is None:
        return "no C++ compiler"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    done = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=False)
    if "Free Software Foundation" not in done.stdout:
        return f"{COMPILER} is not GCC, whose hooks the emulation implements"
    return None


def sources(root: Path, bits: Iterable[int]) -> list[Path]:
    """What the emulation is made of; of the product's kernels only those of some widths."""
    left_out = {f"gemm_{width}bit" for width in BITS} - {f"gemm_{width}bit" for width in bits}
    kernels = [path for path in sorted((root / "cuda").glob("*.cu")) if path.stem not in {"device", *left_out}]
    return kernels + [
        root / "cuda" / "gemm_plan.cpp",
        root / "bindings_cuda.cpp",
        *sorted((root / "emulation").glob("*.cpp")),
    ]


def build(root: Path = CSRC, bits: Iterable[int] = BITS) -> Path:
    """Compile and link; returns the module's file.

    Raises:
        RuntimeError: with the compiler's words, where it fails.
    """
    bits = tuple(bits)
    (STORE / "objects").mkdir(parents=True, exist_ok=True)
    todo = sources(root, bits)
    if set(bits) != set(BITS):
        todo.append(_absent_widths(bits))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(_compiled, todo))
    digest = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
    target = STORE / digest / "mmq_emulation.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        _run([str(COMPILER), "-shared", *map(str, objects)], target)
    return target


def load(path: Path) -> ModuleType:
    """The module in a file that `build` made."""
    spec = importlib.util.spec_from_file_location("mmq_emulation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def module() -> ModuleType:
    """The emulation of the sources as they are; built once, whoever of several test processes comes first."""
    STORE.mkdir(parents=True, exist_ok=True)
    with (STORE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return load(build())


class EmulatedBackend(CudaBackend):
    """The CUDA backend on CPU tensors: same Python, same kernels, no GPU."""

    def __init__(self, native: ModuleType) -> None:
        super().__init__()
        self.native = native

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, call: Call) -> str | None:
        return self.why_not_weight(call)

    def _native(self) -> Any:
        return self.native.cuda

    def _target(self, device: torch.device) -> tuple[int, int]:
        return 0, 0

    def _take_counters(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)

    @contextmanager
    def scheduled(self, policy: str, seed: int = 0, **knobs: int) -> Iterator[None]:
        """Run with a schedule and a machine of a kind; see `configure` of csrc/emulation/module.cpp."""
        self.native.configure(policy=POLICIES[policy], seed=seed, **knobs)
        self._workspace_size.cache_clear()
        try:
            yield
        finally:
            self.native.configure()
            self._workspace_size.cache_clear()


def _flags(source: Path) -> list[str]:
    flags = COMMON.split() + (KERNELS if source.suffix == ".cu" else HOST).split()
    if os.uname().machine == "x86_64":
        flags.append("-march=x86-64-v3")
    if source.suffix != ".cu":
        import pybind11

        flags += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    return flags


def _compiled(source: Path) -> Path:
    """The object of a source, from the store where nothing that it includes has changed."""
    flags = _flags(source)
    digest = hashlib.sha256(" ".join([str(COMPILER), *flags, source.name]).encode())
    for path in sorted(_closure(source, set())):
        digest.update(path.read_bytes())
    target = STORE / "objects" / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    if not target.exists():
        _run([str(COMPILER), *flags, "-c", str(source)], target)
    return target


def _closure(source: Path, seen: set[Path]) -> set[Path]:
    """A file and everything of csrc that it includes."""
    seen.add(source)
    for name in _INCLUDE.findall(source.read_text()):
        path = (source.parent / name).resolve()
        if path.exists() and path not in seen:
            _closure(path, seen)
    return seen


def _absent_widths(bits: tuple[int, ...]) -> Path:
    """A source with empty kernels of the widths that were left out, so that the module links."""
    lines = ["template <class T, int kBits>", "void launch_gemm(const GemmCall&, Target);"]
    for width in sorted(set(BITS) - set(bits)):
        for dtype in ("Half", "BFloat"):
            lines.append(f"template <> void launch_gemm<{dtype}, {width}>(const GemmCall&, Target) {{ std::abort(); }}")
    text = f'#include <cstdlib>\n#include "{CSRC}/cuda/gemm_plan.h"\n#include "{CSRC}/cuda/ptx.cuh"\n'
    text += "namespace mmq::cuda {\n" + "\n".join(lines) + "\n}\n"
    path = STORE / f"absent_{''.join(map(str, bits))}.cu"
    if not path.exists() or path.read_text() != text:
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        partial.replace(path)
    return path


def _run(command: list[str], target: Path) -> None:
    """Run a command that makes `target`, which appears whole or not at all."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(target)
