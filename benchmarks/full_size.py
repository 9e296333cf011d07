"""A model of full size through the whole path: write it, quantize it from folder to folder, load it, caption an image.

The model is BLIP-2-OPT-2.7b's architecture from its config with random bf16 weights (3.7e9 of them, no download), so
what it says is noise; what is measured are memory, disk and seconds. Each step is a process of its own, whose peak
of resident memory the kernel counts::

    python benchmarks/full_size.py --folder DIR

Needs 11 GB of disk while it runs. Appends one line to `benchmarks/results/full_size.jsonl`, and ends with exit code 1
where a bound is not kept: 6 GB of memory to quantize, 2.3 GB on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from recorded import RESULTS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from mmq_kernels.bench.models import IMAGE_TOKEN, QUERIES, VOCABULARY, blip2_config
from mmq_kernels.bench.record import append, provenance
from mmq_kernels.checkpoint import disk_bytes, load, load_processor, quantize_checkpoint
from mmq_kernels.checkpoint.folder import write_config, written_beside
from mmq_kernels.checkpoint.format import describe
from mmq_kernels.checkpoint.shards import ShardWriter
from mmq_kernels.checkpoint.skeleton import places, tied_names
from mmq_kernels.cli.devices import peak_bytes
from mmq_kernels.nn import parameters_on_meta

RECIPE = "all=rtn:4:g128"
PEAK_BOUND_BYTES = 6_000_000_000
DISK_BOUND_BYTES = 2_300_000_000
SHARD_BYTES = 2_000_000_000


def processor() -> Blip2Processor:
    """A tokenizer of one word an id, and BLIP's image processor."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    for word, i in {"<pad>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}.items():
        del words[f"w{i}"]
        words[word] = i
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="</s>", eos_token="</s>", unk_token="<unk>"
    )
    images = BlipImageProcessor(size={"height": 224, "width": 224})
    return Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)


def build(folder: Path) -> dict[str, Any]:
    """Write the unquantized model."""
    return write_random(lambda: Blip2ForConditionalGeneration(blip2_config()), folder / "source", processor())


def write_random(make: Callable[[], nn.Module], out: Path, its_processor: Any = None) -> dict[str, Any]:
    """A model with random weights, written tensor by tensor without ever holding it."""
    with parameters_on_meta():
        model = make()
    aliases = tied_names(model)
    generator = torch.Generator().manual_seed(0)
    weights = 0
    with written_beside(out) as target:
        writer = ShardWriter(target, SHARD_BYTES)
        for name, place in places(model).items():
            if name in aliases:
                continue
            values = torch.empty(place.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            if name.endswith("weight") and values.dim() == 1:  # of a norm
                values += 1
            writer.add(name, values)
            weights += values.numel()
        writer.close()
        write_config(target, model, "bfloat16", describe({}))
        if its_processor is not None:
            its_processor.save_pretrained(target)
    return {"weights": weights, "disk_bytes": disk_bytes(out)}


def quantize(folder: Path) -> dict[str, Any]:
    """From folder to folder, as `mmq quantize` does it."""
    report = quantize_checkpoint(folder / "source", RECIPE, folder / "quantized")
    return {
        "recipe": report["recipe"],
        "layers": len(report["layers"]),
        "left_alone": report["left_alone"],
        "disk_bytes": report["disk_bytes"],
    }


def caption(folder: Path) -> dict[str, Any]:
    """Load the quantized model and let it say something about one image."""
    start = time.perf_counter()
    model: Any = load(folder / "quantized")
    loaded = time.perf_counter()
    read = load_processor(folder / "quantized")
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    inputs = read(images=Image.fromarray(pixels), text="", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, min_new_tokens=8, max_new_tokens=8, do_sample=False)
    return {
        "load_seconds": round(loaded - start, 2),
        "caption_seconds": round(time.perf_counter() - loaded, 2),
        "new_tokens": 8,
        "dtype": str(model.dtype).removeprefix("torch."),
        "caption": read.batch_decode(tokens, skip_special_tokens=True)[0].strip(),
    }


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {"build": build, "quantize": quantize, "caption": caption}


def run_step(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--threads", str(threads), "--step", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"step {name} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Full-size model: quantize from folder to folder, load, caption.")
    parser.add_argument("--folder", type=Path, required=True, help="where to work; 11 GB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--keep", action="store_true", help="leave the models in the folder")
    parser.add_argument("--step", choices=STEPS, help="run one step in this process and print its JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.step:
        start = time.perf_counter()
        facts = STEPS[options.step](options.folder)
        print(json.dumps(facts | {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak_bytes()}))
        return 0
    about = provenance()
    steps: dict[str, Any] = {}
    try:
        for name in STEPS:
            steps[name] = run_step(name, options.folder, options.threads)
            print(f"{name}: {json.dumps(steps[name])}", file=sys.stderr, flush=True)
    finally:
        if not options.keep:
            for name in ("source", "quantized"):
                shutil.rmtree(options.folder / name, ignore_errors=True)
    kept = steps["quantize"]["peak_bytes"] <= PEAK_BOUND_BYTES and steps["quantize"]["disk_bytes"] <= DISK_BOUND_BYTES
    line = {
        "benchmark": "full_size",
        "bounds_kept": kept,
        **steps,
    }
    line |= about
    append(RESULTS / "full_size.jsonl", [line])
    print(json.dumps(line))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
