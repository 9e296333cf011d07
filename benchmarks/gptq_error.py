"""How much of a layer's output GPTQ loses, with what makes it better, on every layer of the demo's BLIP-2.

    python benchmarks/gptq_error.py [--out FILE]

Hessians of the float model's inputs on half of the calibration samples, errors judged on that half and on the other.
A row a setting: the mean over the layers of each way's error, as a share of that of GPTQ with activation order, and the
time that it took, its factorization counted, as a multiple of that way's. Lines are appended.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from recorded import RESULTS
from torch import Tensor, nn

from mmq_kernels import checkpoint
from mmq_kernels.bench.record import append, provenance
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.eval.calibration import CalibrationSource
from mmq_kernels.quantize import GptqSettings, Hessian, gptq
from mmq_kernels.quantize.gptq import weighted_error
from mmq_kernels.quantize.hessian import factorize
from mmq_kernels.spec import QuantSpec

SPECS = (QuantSpec(4, 128, True), QuantSpec(3, 128), QuantSpec(2, 32))
WAYS = {
    "gptq": GptqSettings(),
    "ordered": GptqSettings(order="activation"),
    "searched": GptqSettings(order="activation", grid="search"),
    "gptq+": GptqSettings().beyond(),
    "gptq+ 2 rounds": GptqSettings(rounds=2).beyond(),
}
TASKS = {"blip2": ("caption:coco", "vqa:vqav2"), "blip2-itm": ("retrieval:flickr30k",)}
"""By model: what it is calibrated on, each with the folder that the world has for it."""
SIZE = WorldSize(train=192, images=32, questions=4, gallery=16)


Layer = tuple[Tensor, Tensor, Tensor]
"""A weight, and the Hessians of the two halves."""


def layers(kind: str = "blip2") -> dict[str, Layer]:
    """The layers of one of the demo's models by name."""
    stored = weights_folder(kind)
    model, processor = checkpoint.load(stored, dtype=torch.float32), checkpoint.load_processor(stored)
    halves: tuple[dict[str, Hessian], dict[str, Hessian]] = ({}, {})
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name}
    now = halves[0]

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            now.setdefault(name, Hessian(args[0].shape[-1], args[0].device)).add(args[0])

        return hook

    for name, linear in linears.items():
        linear.register_forward_pre_hook(watch(name))
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        world = write_world(Path(temporary) / "world", seed=7, size=SIZE)
        tasks = (task.split(":") for task in TASKS[kind])
        source = CalibrationSource.parse([f"{task}:{world / folder}" for task, folder in tasks], 96)
        batches = list(source.batches(model, processor))
        for half, part in zip(halves, (batches[::2], batches[1::2]), strict=True):
            now = half
            for batch in part:
                model(**batch)
    seen = [name for name in linears if name in halves[0] and name in halves[1]]
    return {name: (linears[name].weight.detach(), halves[0][name].value(), halves[1][name].value()) for name in seen}


def measure(spec: QuantSpec, found: dict[str, Layer]) -> dict[str, object]:
    errors: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for name, (weight, calibrated, held_out) in found.items():
        for way, settings in WAYS.items():
            begin = time.perf_counter()
            quantized = gptq(weight, factorize(calibrated, settings, name), spec, settings)
            seconds[way] += time.perf_counter() - begin
            dense = quantized.dequantize(spec)
            errors[way].append((weighted_error(weight, dense, calibrated), weighted_error(weight, dense, held_out)))
    base = torch.tensor(errors["ordered"])
    shares = {way: (torch.tensor(rows) / base).mean(0).tolist() for way, rows in errors.items()}
    return {
        "bench": "gptq_error",
        "bits": spec.bits,
        "group": spec.group_size,
        "symmetric": spec.symmetric,
        "layers": len(found),
        **{f"{way}: error": shares[way][0] for way in WAYS},
        **{f"{way}: held-out error": shares[way][1] for way in WAYS},
        **{f"{way}: time": seconds[way] / seconds["ordered"] for way in WAYS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "gptq_error.jsonl", help="file that lines are appended to"
    )
    options = parser.parse_args()
    about, found = provenance(), layers()
    for spec in SPECS:
        row = measure(spec, found)
        print(spec)
        for way in WAYS:
            error, held_out, took = (row[f"{way}: {what}"] for what in ("error", "held-out error", "time"))
            print(f"  {way:16} error {error:.3f}   held out {held_out:.3f}   time {took:.1f}x")
        append(options.out, [row | about])


if __name__ == "__main__":
    main()
