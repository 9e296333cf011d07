"""Train the shipped miniatures: ``python -m mmq_kernels.demo.train --out DIR``.

The ViT alone; then, from its weights and side by side in two processes, BLIP-2 on captions and questions and BLIP-2 on
image-text matching; and by itself LLaVA. Everything is generated on the fly from seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import get_context
from transformers import Blip2Processor, LlavaProcessor, PreTrainedModel

from mmq_kernels.demo.architecture import make_llava_processor, make_processor
from mmq_kernels.demo.loop import Schedule
from mmq_kernels.demo.scenes import CAPTIONS
from mmq_kernels.demo.train_blip2 import Round, train_blip2, train_vision
from mmq_kernels.demo.train_itm import train_itm
from mmq_kernels.demo.train_llava import train_llava

VISION = Schedule(steps=1600, batch=32, learning_rate=1.2e-3)
BLIP2 = (
    Round(Schedule(steps=2500, batch=32, learning_rate=1e-3, horizon=4000), wordings=CAPTIONS, taught=True),
    Round(Schedule(steps=3000, batch=32, learning_rate=8e-4, warmup=150), wordings=CAPTIONS),
    # One wording: what bits change is then what a caption says, not how it says it.
    Round(Schedule(steps=1000, batch=32, learning_rate=4e-4, warmup=100), wordings=1),
)
TOWER = Schedule(steps=1600, batch=32, learning_rate=1.2e-3)
LLAVA = (
    Schedule(steps=6000, batch=16, learning_rate=1e-3),
    Schedule(steps=2000, batch=16, learning_rate=6e-4, warmup=100),
)
ITM = Schedule(steps=2000, batch=32, learning_rate=8e-4)


def save(model: PreTrainedModel, processor: Blip2Processor | LlavaProcessor, folder: Path) -> None:
    """Write a model in fp16 with its processor, as `from_pretrained` of transformers 4 and 5 reads them."""
    half = copy.deepcopy(model).cpu().half()
    half.config.dtype = torch.float16
    half.save_pretrained(folder)
    _use_old_names(folder / "model.safetensors")
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # transformers 4 looks for preprocessor_config.json
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    # transformers 5 writes a list under a name where transformers 4 wants a mapping; both read the older name.
    listed = described.pop("extra_special_tokens", None)
    described["additional_special_tokens"] = listed or described["additional_special_tokens"]
    path.write_text(json.dumps(described, indent=2) + "\n")


def _use_old_names(file: Path) -> None:
    """Name a LLaVA's tower as the hub's folders do; transformers 5.24 leaves a part out, which transformers 4 wants."""
    new, old = "vision_tower.", "vision_tower.vision_model."
    tensors = load_file(file)
    if any(name.startswith(new) and not name.startswith(old) for name in tensors):
        renamed = {re.sub(f"^{re.escape(new)}", old, name): tensor for name, tensor in tensors.items()}
        save_file(renamed, file, {"format": "pt"})


def _train_one(which: str, out: Path, scale: float, seed: int, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if which == "llava":
        store = partial(save, processor=make_llava_processor(), folder=out / which)
        schedules = [schedule.scaled(scale) for schedule in LLAVA]
        train_llava(TOWER.scaled(scale), schedules, seed=seed, log=out / "llava.jsonl", device=device, save=store)
        return
    vision = torch.load(out / "vision.pt", weights_only=True)
    retrieval = which == "itm"
    folder = out / ("blip2-itm" if retrieval else "blip2")
    store = partial(save, processor=make_processor(retrieval=retrieval), folder=folder)
    log = out / f"{which}.jsonl"
    if retrieval:
        train_itm(vision, ITM.scaled(scale), seed=seed, log=log, device=device, save=store)
    else:
        rounds = [replace(round_, schedule=round_.schedule.scaled(scale)) for round_ in BLIP2]
        train_blip2(vision, rounds, seed=seed, log=log, device=device, save=store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps of every stage")
    parser.add_argument(
        "--only",
        choices=("vision", "blip2", "itm", "llava"),
        help="one stage; blip2 and itm need the weights of vision",
    )
    arguments = parser.parse_args()
    out, seed, device, scale = arguments.out, arguments.seed, arguments.device, arguments.scale
    out.mkdir(parents=True, exist_ok=True)

    if arguments.only in (None, "vision"):
        torch.set_num_threads(os.cpu_count() or 1)
        vision = train_vision(VISION.scaled(scale), seed=seed, log=out / "vision.jsonl", device=device)
        torch.save(vision, out / "vision.pt")
    stages = [name for name in ("blip2", "itm", "llava") if arguments.only in (None, name)]
    threads = max(1, (os.cpu_count() or 1) // 2)  # as if both ran, so that one stage alone gives the same numbers
    context = get_context("spawn")
    workers = [context.Process(target=_train_one, args=(name, out, scale, seed, device, threads)) for name in stages]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [name for name, worker in zip(stages, workers, strict=True) if worker.exitcode]
    if failed:
        raise SystemExit(f"training of {' and '.join(failed)} failed")


if __name__ == "__main__":
    main()
