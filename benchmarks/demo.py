"""The demo's table as JSON lines: every variant's scores, sizes and speed, with what a figure has to name.

    python benchmarks/demo.py --out demo-out [--full]

Runs `run_demo` and replaces `results/demo.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recorded import RESULTS

from mmq_kernels.bench.record import append, provenance
from mmq_kernels.demo.run import run_demo
from mmq_kernels.demo.variants import all_variants, standard_variants

KEPT = ("name", "method", "recipe", "bits", "metrics", "changes", "bpw", "memory_bytes", "captions_per_second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="the demo's folder")
    parser.add_argument("--full", action="store_true", help="every combination of 2, 3, 4 and 16 bits")
    options = parser.parse_args()
    about = provenance()
    variants = all_variants() if options.full else standard_variants()
    report = run_demo(options.out, variants, progress=lambda done, total, what: print(f"{done}/{total} {what}"))
    about |= {
        "threads_a_process": report["threads"],
        "samples": report["samples"],
        "seconds": round(report["seconds"], 1),
    }
    lines = [
        {key: row[key] for key in KEPT}
        | {"quantize_seconds": round(row["quantize_seconds"], 2), "evaluate_seconds": round(row["evaluate_seconds"], 2)}
        | about
        for row in json.loads(json.dumps(report["rows"]))
    ]
    path = RESULTS / "demo.jsonl"
    path.unlink(missing_ok=True)
    append(path, lines)
    print(f"{len(lines)} lines in {path}, {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
