"""Are the miniatures good enough to measure on, and hard enough that bits matter? Prints one JSON object.

Held-out scenes, straight from the generator (no files): answers by kind of question, captions whose objects are
exactly right, teacher-forced loss, for the float model and for parts rounded to few bits.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from mmq_kernels import ops
from mmq_kernels.demo.architecture import PROMPT, QUERIES
from mmq_kernels.demo.samples import pixels, text_batch
from mmq_kernels.demo.scenes import COLORS, SHAPES, SIZES, Scene, make_scene, questions
from mmq_kernels.demo.train_blip2 import packed_losses
from mmq_kernels.spec import QuantSpec

PARTS = {
    "vision": ("vision_model.encoder.",),
    "connector": ("qformer.", "language_projection"),
    "language": ("language_model.model.",),
}
HELD_OUT_SEED = 500_000_000

_OBJECT = re.compile(rf"({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


def objects_named(caption: str) -> list[str]:
    """The objects that a caption names, sorted."""
    return sorted(" ".join(match) for match in _OBJECT.findall(caption.lower()))


@contextmanager
def rounded(model: nn.Module, prefixes: tuple[str, ...], spec: QuantSpec) -> Iterator[Any]:
    """A copy of the model whose linears under `prefixes` are rounded to nearest; heads are left alone."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefixes):
            codes, scale, zero = ops.quantize_rtn(module.weight.data.float(), spec)
            length = spec.group_length(codes.shape[1])
            s, z = (t.float().repeat_interleave(length, 1)[:, : codes.shape[1]] for t in (scale, zero))
            module.weight.data = (s * (codes.float() - z)).to(module.weight.dtype)
    yield model


@torch.inference_mode()
def measure(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, scenes: list[Scene], asked: int
) -> dict[str, object]:
    """Scores of one model on held-out scenes."""
    rng = random.Random("check")
    right: dict[str, list[bool]] = defaultdict(list)
    exact: list[bool] = []
    loss = torch.zeros(2)
    batches = [scenes[i : i + 100] for i in range(0, len(scenes), 100)]
    for batch in batches:
        images = pixels(batch)
        for scene, caption in zip(batch, _generate(model, processor, images, None, 40), strict=True):
            exact.append(objects_named(caption) == sorted(o.name for o in scene.objects))
        found = [(i, q) for i, scene in enumerate(batch) for q in questions(scene, asked, rng)]
        prompts = [PROMPT.format(q.text) for _, q in found]
        for (_, q), answer in zip(
            found, _generate(model, processor, images[[i for i, _ in found]], prompts, 4), strict=True
        ):
            right[q.kind].append(answer.strip() == q.answer)
        _, _, caption_loss, answer_loss = packed_losses(
            model, images, text_batch(batch, processor.tokenizer, random.Random(0), asked=asked, wordings=1)
        )
        loss += torch.stack([caption_loss, answer_loss])
    every = [value for values in right.values() for value in values]
    return {
        "vqa": round(sum(every) / len(every), 4),
        "exact": round(sum(exact) / len(exact), 4),
        "caption_nll": round(float(loss[0]) / len(batches), 4),
        "answer_nll": round(float(loss[1]) / len(batches), 4),
        "kinds": {kind: round(sum(v) / len(v), 3) for kind, v in sorted(right.items())},
    }


def _generate(
    model: Any,
    processor: Blip2Processor,
    images: Tensor,
    prompts: list[str] | None,
    tokens: int,
) -> list[str]:
    inputs = {}
    if prompts is not None:
        tokenizer = processor.tokenizer
        text = tokenizer(prompts, padding=True, return_tensors="pt")
        front = torch.full((len(prompts), QUERIES), model.config.image_token_index)
        inputs["input_ids"] = torch.cat([front, text.input_ids], 1)
        inputs["attention_mask"] = torch.cat([torch.ones_like(front), text.attention_mask], 1)
    out = model.generate(pixel_values=images, max_new_tokens=tokens, do_sample=False, num_beams=1, **inputs)
    if prompts is not None and out.shape[1] > tokens + 1:
        out = out[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(out, skip_special_tokens=True)


def check(folder: str, *, scenes: int = 300, asked: int = 7) -> dict[str, object]:
    """All measurements of the generation model in `folder`."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Blip2Processor.from_pretrained(folder)
    held_out = [make_scene(HELD_OUT_SEED + i) for i in range(scenes)]
    out: dict[str, object] = {"float": measure(model, processor, held_out, asked)}
    cases = {"all-4": (tuple(p for part in PARTS.values() for p in part), 4)}
    cases |= {f"{part}-2": (prefixes, 2) for part, prefixes in PARTS.items()}
    for name, (prefixes, bits) in cases.items():
        with rounded(model, prefixes, QuantSpec(bits, 64)) as copy_:
            out[name] = measure(copy_, processor, held_out, asked)
    return out


if __name__ == "__main__":
    import sys

    print(json.dumps(check(sys.argv[1]), indent=1))
