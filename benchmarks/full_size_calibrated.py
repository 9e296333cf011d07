"""GPTQ and AWQ of models of full size, block by block from folder to folder: how much memory, and how long a block.

    python benchmarks/full_size_calibrated.py --folder DIR [--model blip2 llava] [--method gptq awq] [--blocks 2]

BLIP-2-OPT-2.7b and LLaVA-1.5-7B from their configs with random bf16 weights (no download), calibrated on samples of
random pixels and tokens (--samples, 16). Every layer is quantized to 4 bits; those of the first blocks of each
component, and all those of a connector, by the method, the others to nearest: a block's memory does not depend on how
many there are. Each run is a process of its own, whose peak of resident memory the kernel counts, against the bound

    4 x the largest block in fp32 + the calibration's activations + 2 GiB.

Needs 20 GB of disk (LLaVA; 11 GB BLIP-2). Appends a line a run; exit code 1 where the bound is not kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from full_size import write_random
from recorded import RESULTS
from torch import nn
from transformers import Blip2ForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

from mmq_kernels.bench.models import blip2_config
from mmq_kernels.bench.record import append, provenance
from mmq_kernels.checkpoint import disk_bytes, quantization, quantize_checkpoint
from mmq_kernels.checkpoint.skeleton import build_skeleton
from mmq_kernels.cli.devices import peak_bytes
from mmq_kernels.models.families import blocks_of, family_of

BATCH, WORDS = 8, 32
GIB = 1 << 30

MODELS: dict[str, Callable[[], nn.Module]] = {
    "blip2": lambda: Blip2ForConditionalGeneration(blip2_config()),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(text_config={"model_type": "llama", "vocab_size": 32064}, image_seq_length=576)
    ),
}


class RandomCalibration:
    """Calls with random pixels, and random words behind the image tokens."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def fingerprint(self) -> str:
        return f"random, {self.samples} samples"

    def batches(self, model: Any, processor: Any) -> Sequence[dict[str, Any]]:
        config, generator = model.config, torch.Generator().manual_seed(1)
        blip2 = config.model_type == "blip-2"
        side, tokens = config.vision_config.image_size, config.num_query_tokens if blip2 else config.image_seq_length
        made = []
        for begin in range(0, self.samples, BATCH):
            batch = min(BATCH, self.samples - begin)
            ids = torch.randint(10, 1000, (batch, tokens + WORDS), generator=generator)
            ids[:, :tokens] = config.image_token_index
            pixels = torch.randn(batch, 3, side, side, generator=generator).to(model.dtype)
            made.append({"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return made


def recipe(folder: Path, method: str, count: int) -> str:
    """The first `count` blocks of each list, and what stands alone, by the method."""
    model = build_skeleton(folder)
    names = [name for part in blocks_of(model, family_of(model)) for name in part.names[:count]]
    chosen = "|".join(sorted({name.replace(".", r"\.") for name in names}))
    return f"all=rtn:4:g128 re:({chosen})(\\..*)?={method}:4:g128"


def bound(folder: Path, samples: int) -> dict[str, int]:
    """Bytes that the run may take, and of what."""
    model: Any = build_skeleton(folder)
    sizes = [
        sum(parameter.numel() for parameter in model.get_submodule(name).parameters()) * 4
        for part in blocks_of(model, family_of(model))
        for name in part.names
    ]
    text, vision = model.config.text_config, model.config.vision_config
    seen = getattr(model.config, "image_seq_length", None) or model.config.num_query_tokens
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    activations = 4 * samples * max((seen + WORDS) * text.hidden_size, patches * vision.hidden_size)
    largest = max(sizes)
    return {"largest_block": largest, "activations": activations, "bound": 4 * largest + activations + 2 * GIB}


def run(folder: Path, model: str, method: str, count: int, samples: int) -> dict[str, Any]:
    source, out = folder / model, folder / f"{model}-{method}"
    quantization.load_processor = lambda source: None  # type: ignore[assignment]
    report = quantize_checkpoint(source, recipe(source, method, count), out, calibration=RandomCalibration(samples))
    used = [layer["used"] for layer in report["layers"]]
    return {
        "layers": {name: used.count(name) for name in sorted(set(used))},
        "disk_bytes": disk_bytes(out),
        "peak_bytes": peak_bytes(),
        "core_seconds": round(time.process_time(), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--method", nargs="+", default=["gptq", "awq"])
    parser.add_argument("--blocks", type=int, default=2, help="of each list of blocks, calibrated")
    parser.add_argument("--samples", type=int, default=16, help="of calibration")
    parser.add_argument("--out", type=Path, default=RESULTS / "full_size_calibrated.jsonl", help="file to append to")
    parser.add_argument("--step", action="store_true", help="run in this process and print its JSON")
    options = parser.parse_args()
    if options.step:
        begin = time.perf_counter()
        facts = run(options.folder, options.model[0], options.method[0], options.blocks, options.samples)
        print(json.dumps(facts | {"seconds": round(time.perf_counter() - begin, 1)}))
        return 0
    kept = True
    for model in options.model:
        source = options.folder / model
        if not source.is_dir():
            write_random(MODELS[model], source)
        allowed = bound(source, options.samples)
        for method in options.method:
            out = options.folder / f"{model}-{method}"
            command = [sys.executable, __file__, "--folder", str(options.folder), "--model", model, "--step"]
            command += ["--method", method, "--blocks", str(options.blocks), "--samples", str(options.samples)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            shutil.rmtree(out, ignore_errors=True)
            row = {"bench": "full_size_calibrated", "model": model, "method": method, "blocks": options.blocks}
            row |= {"samples": options.samples} | allowed | json.loads(done.stdout.splitlines()[-1])
            row["kept"] = row["peak_bytes"] <= row["bound"]
            kept = kept and row["kept"]
            print(row, flush=True)
            append(options.out, [row | provenance()])
        shutil.rmtree(source, ignore_errors=True)
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
