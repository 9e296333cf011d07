"""What `test_team` launches on several ranks: the demo's models on all tasks; rank 0 leaves numbers and predictions.

torchrun --nproc-per-node 3 ranks.py WORLD OUT
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmq_kernels import checkpoint
from mmq_kernels.demo import weights_folder
from mmq_kernels.eval import EvalOptions, EvalResult, evaluate_prepared, prepare
from mmq_kernels.eval.team import ALONE, Team, launched

BATCHES = {"caption": (3, 100), "vqa": (3,), "retrieval": (3, 100)}
"""Images a chunk: some that the images do not divide into, and more than there are, so that ranks go without any."""

IMAGES = {"caption": (7, 1), "vqa": (7,), "retrieval": (7,)}


def evaluations(world: Path, out: Path, team: Team = ALONE) -> Iterator[tuple[str, EvalResult]]:
    """Names of evaluations, and what they gave."""
    for name, tasks in (("blip2", {"caption": "coco", "vqa": "vqav2"}), ("blip2-itm", {"retrieval": "flickr30k"})):
        model = checkpoint.load(weights_folder(name))
        processor = checkpoint.load_processor(weights_folder(name))
        for task, folder in tasks.items():
            for limit in IMAGES[task]:
                data = prepare(task, world / folder, processor, limit=limit, tokenizer="plain")
                for batch_size in BATCHES[task]:
                    options = EvalOptions(batch_size=batch_size, meteor=False, top_k=3)
                    kept = out / f"{task}-{limit}-{batch_size}.jsonl"
                    yield kept.stem, evaluate_prepared(model, data, options=options, predictions=kept, team=team)


def numbers(result: EvalResult) -> dict[str, Any]:
    """All of `result` but for times."""
    timed = ("seconds", "samples_per_second", "tokens_per_second")
    return {name: value for name, value in result.to_json().items() if name not in timed}


if __name__ == "__main__":
    with launched() as team:
        found = {name: numbers(result) for name, result in evaluations(Path(sys.argv[1]), Path(sys.argv[2]), team)}
        equal = team.gather(json.dumps(found))
        assert len(set(equal)) == 1, "every rank gets the same result"
        if team.leads:
            Path(sys.argv[2], "found.json").write_text(json.dumps({"ranks": team.size, "found": found}))
