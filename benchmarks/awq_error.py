"""What AWQ and round to nearest lose of the output of the demo's models, one component at a time.

    python benchmarks/awq_error.py [--out FILE] [--spec 3:g64] [--model blip2 blip2-itm llava] [--samples 384]

A component of a trained model is quantized, calibrated on a quarter of the samples. Squared errors, of what the
component puts out and of the model's logits (retrieval: scores and embeddings), are summed over that quarter and over
the others, and given as a share of those of round to nearest. Lines are appended.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recorded import RESULTS
from torch import Tensor, nn

from mmq_kernels import checkpoint
from mmq_kernels.bench.record import append, provenance
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.models import family_of, quantize_model
from mmq_kernels.models.plan import list_layers

WRITES = {"caption": "coco", "vqa": "vqav2"}
TASKS = {"blip2": WRITES, "blip2-itm": {"retrieval": "flickr30k"}, "llava": WRITES}
COMPONENTS = ("vision", "connector", "language")
SIZE = WorldSize(train=768, images=32, questions=4, gallery=16)
LOGITS = ("logits", "logits_per_image", "text_embeds", "image_embeds", "itm_score")


Outputs = dict[str, list[Tensor]]


def outputs(model: nn.Module, component: str, batches: Sequence[dict[str, Any]]) -> Outputs:
    """What the parts of a component put out, and what the model does."""
    found: Outputs = {"component": [], "logits": []}

    def watch(module: nn.Module, args: Any, result: Any) -> None:
        found["component"].append((result if isinstance(result, Tensor) else result[0]).double())

    modules = dict(model.named_modules())
    paths = [part.path for part in family_of(model).parts if part.component == component and part.path in modules]
    hooks = [modules[path].register_forward_hook(watch) for path in paths]
    with torch.no_grad():
        for batch in batches:
            result = model(**batch)
            found["logits"] += [result[name].double() for name in LOGITS if isinstance(result.get(name), Tensor)]
    for hook in hooks:
        hook.remove()
    return found


def lost(found: list[Tensor], expected: list[Tensor]) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))


def measure(kind: str, spec: str, world: Path, samples: int) -> list[dict[str, Any]]:
    folder = weights_folder(kind)
    model, processor = checkpoint.load(folder, dtype=torch.float32), checkpoint.load_processor(folder)
    source = CalibrationSource.parse([f"{task}:{world / own}" for task, own in TASKS[kind].items()], samples)
    batches = list(source.batches(model, processor))
    parts = {"calibration": batches[::4], "held out": [batch for i, batch in enumerate(batches) if i % 4]}
    rows = []
    present = {layer.component for layer in list_layers(model)}
    for component in COMPONENTS:
        if component not in present:
            continue
        expected = {part: outputs(model, component, own) for part, own in parts.items()}
        errors: dict[str, dict[str, float]] = {}
        for method in ("rtn", "awq"):
            quantized = checkpoint.load(folder, dtype=torch.float32)
            quantize_model(quantized, f"{component}={method}:{spec}", parts["calibration"])
            found = {part: outputs(quantized, component, own) for part, own in parts.items()}
            errors[method] = {
                f"{what}, {part}": lost(found[part][what], expected[part][what])
                for part in parts
                for what in ("component", "logits")
            }
        ratios = {what: errors["awq"][what] / error for what, error in errors["rtn"].items()}
        rows.append(
            {"bench": "awq_error", "model": kind, "component": component, "spec": spec, "samples": samples, **ratios}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "awq_error.jsonl", help="file to append to")
    parser.add_argument("--spec", default="3:g64", help="bits and granularity, as in a recipe")
    parser.add_argument("--model", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--samples", type=int, default=384, help="in all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        world = write_world(Path(temporary) / "world", seed=7, size=SIZE)
        for kind in options.model:
            rows = measure(kind, options.spec, world, options.samples)
            append(options.out, [row | provenance() for row in rows])


if __name__ == "__main__":
    main()
