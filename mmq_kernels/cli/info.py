"""`mmq info`: what this installation can do here, and what a checkpoint really holds."""

from __future__ import annotations

import platform
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import mmq_kernels
from mmq_kernels import _native, ops
from mmq_kernels.cli.options import Debug, Json, print_json


def info(
    model: Annotated[str | None, typer.Argument(help="A checkpoint folder: say what it holds.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Version, extension, instruction set, GPUs, backends and why others are not there; or a model's bytes."""
    facts = installation() if model is None else checkpoint_facts(model)
    if json:
        print_json(facts)
    elif model is None:
        _print_installation(facts)
    else:
        _print_checkpoint(facts)


def installation() -> dict[str, Any]:
    """Everything `mmq info` says about the machine and the build."""
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = _native.available()
    return {
        "version": mmq_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _triton_version(),
        "threads": torch.get_num_threads(),
        "extension": {
            "available": native,
            "why_not": _native.why_missing(),
            "build": _native.build_info() if native else None,
        },
        "cpu_isa": _native.isa() if native else None,
        "gpus": _native.cuda_devices() if native else None,
        "backends": {name: {"available": why is None, "why_not": why} for name, why in ops.explain_all(here).items()},
        "forced_backend": ops.forced_backend(),
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def checkpoint_facts(folder: str) -> dict[str, Any]:
    """Sizes of a checkpoint, whole and by component, and how its layers are stored."""
    from mmq_kernels import checkpoint
    from mmq_kernels.eval import model_size
    from mmq_kernels.models.families import component_prefixes
    from mmq_kernels.nn import QuantLinear

    model = checkpoint.load(folder)
    kinds: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            kinds[str(module.spec)] = kinds.get(str(module.spec), 0) + 1
    size = model_size(model, component_prefixes(model)).to_json()
    return {
        "folder": folder,
        "model": type(model).__name__,
        "disk_bytes": checkpoint.disk_bytes(folder),
        "quantized_layers": kinds,
        **size,
    }


def _print_installation(facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    extension, gpus = facts["extension"], facts["gpus"]
    table.add_row("mmq_kernels", facts["version"])
    versions = ", ".join(f"{name} {facts[name] or '(none)'}" for name in ("torch", "transformers", "triton"))
    table.add_row("python", f"{facts['python']}, {versions}")
    table.add_row("extension", _build(extension))
    table.add_row("CPU", f"{facts['cpu_isa'] or 'portable torch'}, {facts['threads']} threads")
    table.add_row("GPUs", _gpus(gpus))
    for name, state in facts["backends"].items():
        table.add_row(f"backend {name}", "available" if state["available"] else f"no: {state['why_not']}")
    if facts["forced_backend"]:
        table.add_row("forced backend", facts["forced_backend"])
    Console().print(table)


def _build(extension: dict[str, Any]) -> str:
    if not extension["available"]:
        return f"no: {extension['why_not']}"
    return ", ".join(f"{key} {value}" for key, value in extension["build"].items() if value)


def _gpus(found: dict[str, Any] | None) -> str:
    if found is None:
        return "unknown: the extension is not built"
    names = [f"{gpu['name']} (sm_{''.join(map(str, gpu['compute_capability']))})" for gpu in found["devices"]]
    why_none = found["reason"] if found["driver"] else "no NVIDIA driver"
    return ", ".join(names) or f"none: {why_none}"


def _print_checkpoint(facts: dict[str, Any]) -> None:
    table = Table("component", "weights", "bpw", "MB held", title=f"{facts['model']} in {facts['folder']}")
    rows = {"whole model": facts, **facts["components"]}
    for name, size in rows.items():
        table.add_row(name, f"{size['weights']:,}", f"{size['bpw']:.3f}", f"{size['memory_bytes'] / 1e6:,.1f}")
    console = Console()
    console.print(table)
    console.print(f"on disk: {facts['disk_bytes'] / 1e6:,.1f} MB")
    for kind, count in sorted(facts["quantized_layers"].items()):
        console.print(f"{count} layers at {kind}")
