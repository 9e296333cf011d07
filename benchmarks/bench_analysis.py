"""A results database of many rows: its size, and what the analysis of all of it and the report on it cost.

    python benchmarks/bench_analysis.py [--out FILE] [--rows 100000] [--groups 12] [--keep FOLDER] [--report]

The rows are those of a sweep: thirds of three components, kinds of layers, groups of several models, tasks and methods,
with six metrics, intervals, recipe and versions each. `mmq analyze` and, if asked, `mmq report` run as a user runs
them, in processes of their own; wall time, processor time and peak of resident memory are measured. A line is appended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from recorded import RESULTS

from mmq_kernels.bench.record import append, provenance
from mmq_kernels.sweep import Result, Store, fingerprint

MODELS = ("Salesforce/blip2-opt-2.7b", "llava-hf/llava-1.5-7b-hf")
TASKS = ("caption", "vqa")
METHODS = ("uniform", "gptq", "awq")
PARTS = tuple(
    f"{part}.{third}" for part in ("vision", "connector", "language") for third in ("first", "middle", "last")
)
BITS = (2, 3, 4, 5, 6, 8, 16)
METRICS = {
    "caption": ("cider", "bleu_1", "bleu_4", "rouge_l", "meteor", "nll"),
    "vqa": ("accuracy", "nll", "accuracy_number", "accuracy_other", "accuracy_yes_no", "length"),
}
VERSIONS = {"mmq_kernels": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "pycocoevalcap": "1.2"}
BATCH = 2_000


def rows(count: int, groups: int) -> Iterator[Result]:
    """Results in which the language model matters most, a pair of thirds interacts, and the rest is noise."""
    named = list(itertools.islice(itertools.product(MODELS, TASKS, METHODS), groups))
    draw = np.random.default_rng(0)
    weights = draw.random(len(PARTS))
    for index in range(count):
        model, task, method = named[index % len(named)]
        bits = draw.choice(BITS, len(PARTS))
        factors = {part: int(value) for part, value in zip(PARTS, bits, strict=True)}
        kind = ("attention", "mlp", "both")[index // len(named) % 3]
        lost = float(weights @ (2.0 ** (2 - bits)) + (bits[0] < 4) * (bits[6] < 4))
        scores = {name: round(max(0.0, 1.2 - 0.3 * lost + 0.02 * draw.normal()), 6) for name in METRICS[task]}
        bpw = float(bits.mean())
        yield Result(
            fingerprint=fingerprint(index=index),
            model=model,
            task=task,
            method=method,
            factors={**factors, "layers": kind},
            metrics=scores,
            intervals={name: (round(value - 0.02, 6), round(value + 0.02, 6)) for name, value in scores.items()},
            samples=5000,
            data="/data/" + task,
            recipe=" ".join(f"{part.replace('.', '/')}={method}:{value}" for part, value in factors.items()),
            bpw=bpw,
            bytes=round(bpw * 4e8),
            latency=0.01 + 0.001 * bpw,
            seconds=60.0,
            seed=0,
            versions=VERSIONS,
        )


def filled(folder: Path, count: int, groups: int) -> Path:
    """The database, written in batches as a sweep writes it."""
    path = folder / "results.db"
    found = rows(count, groups)
    with Store(path) as store:
        while batch := list(itertools.islice(found, BATCH)):
            store.add(batch)
    return path


def measured(*arguments: str) -> dict[str, Any]:
    """Wall and processor seconds, and the peak of resident memory, of `mmq ARGUMENTS`."""
    watched = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_maxrss, used.ru_utime + used.ru_stime); "
        "sys.exit(code)"
    )
    started = time.perf_counter()
    command = [sys.executable, "-c", watched, sys.executable, "-m", "mmq_kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    peak, used = done.stdout.split()
    return {"seconds": seconds, "cpu_seconds": float(used), "peak_bytes": int(peak) * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "analysis.jsonl")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=12, help="models x tasks x methods among which they are dealt")
    parser.add_argument("--keep", type=Path, help="folder in which the database is made, or found, and left")
    parser.add_argument("--report", action="store_true", help="measure the report too")
    asked = parser.parse_args()
    about = provenance()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.db"
        if not path.is_file():
            filled(folder, asked.rows, asked.groups)
        size = sum(each.stat().st_size for each in folder.glob("results.db*"))
        row = {"bench": "analysis", "rows": asked.rows, "groups": asked.groups, "database_bytes": size}
        row |= {f"analyze_{name}": value for name, value in measured("analyze", str(path), "--json").items()}
        if asked.report:
            page = folder / "report.html"
            row |= {f"report_{name}": value for name, value in measured("report", str(path), "-o", str(page)).items()}
            row["page_bytes"] = page.stat().st_size
        row |= about
    append(asked.out, [row])
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
