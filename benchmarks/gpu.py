"""Everything that a machine with a GPU can prove about this package, in one go: build, test, sanitize, measure.

    python benchmarks/gpu.py --out DIR [--steps build,test,sanitize,bench] [--full]

Needs no network and installs nothing: it uses the Python that runs it (>= 3.10, with torch >= 2.8, transformers,
pytest, pybind11, setuptools and ninja), nvcc, and compute-sanitizer where it is found. The extension is built in place
for the GPU at hand. DIR gets a log for each step, `summary.jsonl` with a line for each (what ran, exit code, seconds,
what it found), and the benchmark's `gpu.jsonl` and `roofline.html`. Exits with 1 when a step failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "test", "sanitize", "bench")
OP_TESTS = [
    "python_tests/ops",
    "python_tests/integration",
    "python_tests/backends/test_triton_kernels.py",
    *("-q", "-p", "no:cacheprovider"),
]
"""The public ops on every backend, what torch makes of them, and Triton's kernels, natively."""

GPU_TESTS = ["python_tests/backends", "-k", "gpu", "-q", "-p", "no:cacheprovider"]
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = "exact or combination or order or quantizers or equals or layers or convert or drawn or graph"
"""Under the sanitizer each launch costs seconds; these tests reach every kernel."""


def architecture() -> str:
    """What to compile for the current GPU, as MMQ_CUDA_ARCHS wants it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def sanitizer() -> str | None:
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.is_file() else None)


def commands(out: Path, steps: list[str], full: bool) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name of each part -> its command and what it adds to the environment."""
    python = sys.executable
    parts: dict[str, tuple[list[str], dict[str, str]]] = {}
    if "build" in steps:
        parts["build"] = (
            [python, "setup.py", "--quiet", "build_ext", "--inplace"],
            {"MMQ_CUDA": "on", "MMQ_CUDA_ARCHS": architecture()},
        )
    if "test" in steps:
        workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        parts["test"] = ([python, "-m", "pytest", *GPU_TESTS, *workers], {})
        parts["ops"] = ([python, "-m", "pytest", *OP_TESTS, *workers, *(["--dist", "loadfile"] if workers else [])], {})
    if "sanitize" in steps:
        found = sanitizer()
        for tool in TOOLS if found else ():
            tests = [*GPU_TESTS[:2], f"gpu and ({SANITIZED})", *GPU_TESTS[3:]]
            command = [str(found), "--tool", tool, "--error-exitcode", "9"]
            parts[tool] = ([*command, python, "-m", "pytest", *tests], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if "bench" in steps:
        results = ["--out", str(out / "gpu.jsonl"), "--roofline", str(out / "roofline.html")]
        parts["bench"] = ([python, "benchmarks/bench_gpu.py", *results, *(["--full"] if full else [])], {})
    return parts


def run(name: str, command: list[str], extra: dict[str, str], log: Path) -> dict[str, object]:
    """One part, its output in `log`; what `summary.jsonl` says of it."""
    environment = os.environ | extra | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    begin = time.perf_counter()
    with log.open("w") as lines:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=lines, stderr=subprocess.STDOUT, check=False)
    text = log.read_text(errors="replace")
    told = re.findall(r"^(?:=+ .*(?:passed|failed|error).*=+|\d+ (?:passed|failed).*|=+ ERROR SUMMARY.*)$", text, re.M)
    return {
        "step": name,
        "command": " ".join(command),
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - begin, 1),
        "found": [line.strip("= ") for line in told],
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}")
    parser.add_argument("--full", action="store_true", help="benchmark every shape and width")
    options = parser.parse_args()
    steps = options.steps.split(",")
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        parser.error(f"--steps must be of {', '.join(STEPS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        sys.exit("nothing to prove: torch sees no CUDA device")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, (command, extra) in commands(out, steps, options.full).items():
        result = run(name, command, extra, out / f"{name}.log")
        with (out / "summary.jsonl").open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        found = "; ".join(result["found"][-2:]) if isinstance(result["found"], list) else ""
        print(f"{name}: exit {result['exit_code']} after {result['seconds']} s  {found}", flush=True)
        if result["exit_code"] != 0:
            failed.append(name)
            print("\n".join((out / f"{name}.log").read_text(errors="replace").splitlines()[-15:]), flush=True)
            if name == "build":
                break
    if "sanitize" in steps and sanitizer() is None:
        print("sanitize: left out, no compute-sanitizer found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
