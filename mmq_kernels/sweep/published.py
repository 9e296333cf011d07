"""The result tables that the authors of arXiv 2601.15287 published, as `Result`s.

A table is a CSV file ``METHOD_TASK.csv``. Its rows are configurations: bits of each component (gptq, awq), or one
number of bits and which thirds of which components, and which of their layers, have it (uniform).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmq_kernels.sweep.store import Result, fingerprint

PARAMETERS: Mapping[str, Mapping[str, int]] = {
    "caption": {"vision": 984_023_040, "connector": 104_988_672, "language": 2_516_582_400, "": 139_167_744},
    "retrieval": {"vision": 984_023_040, "connector": 161_611_776, "": 26_988_802},
}
"""Weights that were quantized in each component of BLIP-2-OPT-2.7b and BLIP-2-ITM, and all other parameters."""

MODELS = {"caption": "Salesforce/blip2-opt-2.7b", "retrieval": "Salesforce/blip2-itm-vit-g-coco"}
METHODS = ("uniform", "gptq", "awq")
TASKS = {"captioning": "caption", "retrieval": "retrieval"}
"""Tasks in the names of tables, and as `mmq_kernels.eval` names them."""
UNTOUCHED = 16

COMPONENTS = {"VIT": "vision", "QFORMER": "connector", "LLM": "language"}
THIRDS = ("FIRST", "MIDDLE", "LAST")
KINDS = {"MLP": "mlp", "ATTENTION": "attention", "BOTH": "both"}
SETTINGS = {"uniform": "tensor:asym", "gptq": "channel:sym", "awq": "g128:asym"}
"""Groups and symmetry that the study's methods ran with, as recipes write them."""
SIZES = ("model_size", "quantized_size")
METRICS = {"cider": ("cider", 1.0), "meteor": ("meteor", 1.0)} | {
    f"{short}_r{k}": (f"{long}_r{k}", 0.01) for short, long in (("txt", "text"), ("img", "image")) for k in (1, 5, 10)
}
"""Columns: the names that `mmq_kernels.eval` gives their metrics, and what makes fractions of them."""


def read_published(path: str | Path) -> list[Result]:
    """The rows of one table.

    bpw counts 16 bits for every parameter that was left alone and neither scales nor zero points, as the study does;
    uniform tables do not say how many weights a third has, and have none.

    Raises:
        ValueError: for a file of another name or layout, naming its line; for a configuration that is in it twice.
    """
    path = Path(path)
    named = re.fullmatch(rf"({'|'.join(METHODS)})_({'|'.join(TASKS)})", path.stem)
    if not path.is_file():
        raise ValueError(f"no table {path}")
    if named is None:
        raise ValueError(f"{path} must be named METHOD_TASK.csv, METHOD one of {', '.join(METHODS)}, TASK one of "
                         f"{', '.join(TASKS)}")  # fmt: skip
    method, task = named[1], TASKS[named[2]]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        _check_columns(path, method, reader.fieldnames or ())
        results: dict[str, Result] = {}
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            result = _result(row, method, task, where)
            if result.fingerprint in results:
                raise ValueError(f"{where}: {dict(result.factors)} is in the table twice")
            results[result.fingerprint] = result
    return list(results.values())


def _check_columns(path: Path, method: str, columns: Sequence[str]) -> None:
    if method == "uniform":
        wanted = ["bit_size", "type", *(f"{part}_{third}" for part in COMPONENTS for third in THIRDS)]
    else:
        wanted = ["vit_bits", "qformer_bits"]
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(f"{path} lacks column {', '.join(missing)}; it has {', '.join(columns) or 'none'}")
    if not any(name.lower() in METRICS for name in columns):
        raise ValueError(f"{path} has no metric; one of {', '.join(METRICS)} is needed")


def _result(row: Mapping[str, str | None], method: str, task: str, where: str) -> Result:
    def number(column: str) -> float:
        text = row[column]
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{where}: {column} must be a number, got {text!r}")
        return value

    def bits(column: str) -> int:
        value = number(column)
        if value not in (*range(2, 9), UNTOUCHED):
            raise ValueError(f"{where}: {column} must be 2..8 or {UNTOUCHED}, got {row[column]}")
        return int(value)

    factors: dict[str, float | str] = {}
    facts: dict[str, Any]
    bpw = None
    if method == "uniform":
        kind = str(row["type"]).upper()
        if kind not in KINDS:
            raise ValueError(f"{where}: type must be one of {', '.join(KINDS)}, got {row['type']!r}")
        low = bits("bit_size")
        for part, component in COMPONENTS.items():
            for third in THIRDS:
                touched = number(f"{part}_{third}")
                if touched not in (0, 1):
                    raise ValueError(f"{where}: {part}_{third} must be 0 or 1, got {row[f'{part}_{third}']}")
                factors[f"{component}.{third.lower()}"] = low if touched else UNTOUCHED
        # Many of these configurations are the same model measured again; each has a number of its own.
        facts = {"bits": low, "config": row.get("config"), "factors": list(factors.values()), "kind": kind}
        factors["layers"] = KINDS[kind]
    else:
        for part, component in COMPONENTS.items():
            if f"{part.lower()}_bits" in row:
                factors[component] = bits(f"{part.lower()}_bits")
        parameters = PARAMETERS[task]
        stored = sum(count * int(factors.get(part, UNTOUCHED)) for part, count in parameters.items())
        bpw = stored / sum(parameters.values())
        facts = {"factors": factors}
    if row.get(None):  # type: ignore[call-overload]
        raise ValueError(f"{where} has more values than columns")
    metrics = {
        known: share * number(name)
        for name in row
        if name and name.lower() in METRICS
        for known, share in [METRICS[name.lower()]]
    }
    sizes = [number(name) for name in SIZES if name in row]
    return Result(
        fingerprint=fingerprint(source="arXiv 2601.15287", method=method, task=task, **facts),
        model=MODELS[task],
        task=task,
        method=method,
        factors=factors,
        metrics=metrics,
        recipe=_recipe(factors, method),
        bpw=bpw,
        bytes=round(sizes[0] / 8) if sizes else None,
    )


def _recipe(factors: Mapping[str, float | str], method: str) -> str:
    """A configuration of the study in the one-line form; empty where everything is left alone."""
    kind = factors.get("layers", "both")
    within = "" if kind == "both" else f"/{kind}"
    return " ".join(
        f"{name.replace('.', '/')}{within}={method}:{bits}:{SETTINGS[method]}"
        for name, bits in factors.items()
        if not isinstance(bits, str) and bits != UNTOUCHED
    )
