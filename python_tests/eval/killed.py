"""What `test_predictions` starts: an evaluation killed with SIGKILL again and again, taken up each time.

    python killed.py TASK DATA FILE KILLS SEED

A child is forked for each attempt and killed at a random moment of it; after so many kills one is let through.
Prints how many were killed while they worked, and how many of those had kept something.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_blip2 import blip2_itm, blip2_opt, processor

from mmq_kernels.eval import EvalOptions, evaluate_prepared, prepare

OPTIONS = EvalOptions(batch_size=2, num_beams=2, max_new_tokens=4, meteor=False, top_k=3)


def main(task: str, folder: str, path: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    model, owner = (blip2_itm if task == "retrieval" else blip2_opt)(), processor()
    data, file = prepare(task, folder, owner, tokenizer="plain"), Path(path)
    partial = file.with_name(f"{file.name}.partial")
    data.pixels([data.samples.images[0] if task == "retrieval" else data.samples[0].image])
    generator, killed, kept = random.Random(seed), 0, 0
    begin = time.perf_counter()
    evaluate_prepared(model, data, options=OPTIONS)
    whole = time.perf_counter() - begin
    while killed < kills:
        child = os.fork()
        if not child:
            evaluate_prepared(model, data, options=OPTIONS, predictions=file, resume=True)
            os._exit(0)
        time.sleep(generator.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += 1
        kept += any(part.stat().st_size for part in partial.glob("rank-*.jsonl"))
        if os.WIFEXITED(status) and generator.random() < 0.7:  # it had ended: anew, but for some that find a whole file
            file.unlink()
    evaluate_prepared(model, data, options=OPTIONS, predictions=file, resume=True)
    print(killed, kept)


if __name__ == "__main__":
    main(*sys.argv[1:4], *(int(number) for number in sys.argv[4:]))
