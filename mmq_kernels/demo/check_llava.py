"""How good is the miniature LLaVA? ``python -m mmq_kernels.demo.check_llava FOLDER`` prints one JSON object.

Held-out scenes, straight from the generator, through the model's own processor and chat template: answers by kind of
question, captions whose objects are exactly right, teacher-forced loss; for the float model and for parts rounded.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmq_kernels.demo.architecture import ASK, DESCRIBE
from mmq_kernels.demo.check import HELD_OUT_SEED, objects_named, rounded
from mmq_kernels.demo.samples import as_jpeg, pixels
from mmq_kernels.demo.scenes import Scene, make_scene, questions, render
from mmq_kernels.demo.train_llava import llava_batch, llava_losses
from mmq_kernels.spec import QuantSpec

PARTS = {
    "vision": ("model.vision_tower.",),
    "connector": ("model.multi_modal_projector.",),
    "language": ("model.language_model.",),
}
BATCH = 50


def prompt(processor: LlavaProcessor, said: str) -> str:
    """What the chat template makes of an image and a text."""
    content = [{"type": "image"}, {"type": "text", "text": said}]
    messages: Any = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def answers(model: Any, processor: LlavaProcessor, scenes: list[Scene], said: list[str], tokens: int) -> list[str]:
    """What the model says about each scene, greedily."""
    images = [as_jpeg(render(scene)) for scene in scenes]
    texts = [prompt(processor, text) for text in said]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def measure(model: Any, processor: LlavaProcessor, scenes: list[Scene], asked: int) -> dict[str, Any]:
    """Scores of one model on held-out scenes."""
    rng = random.Random("check")
    right: dict[str, list[bool]] = defaultdict(list)
    exact: list[bool] = []
    loss = torch.zeros(2)
    batches = [scenes[i : i + BATCH] for i in range(0, len(scenes), BATCH)]
    for batch in batches:
        for scene, caption in zip(batch, answers(model, processor, batch, [DESCRIBE] * len(batch), 40), strict=True):
            exact.append(objects_named(caption) == sorted(o.name for o in scene.objects))
        found = [(scene, q) for scene in batch for q in questions(scene, asked, rng)]
        said = answers(model, processor, [s for s, _ in found], [ASK.format(q.text) for _, q in found], 4)
        for (_, q), answer in zip(found, said, strict=True):
            right[q.kind].append(answer.strip() == q.answer)
        _, caption_loss, answer_loss = llava_losses(
            model, pixels(batch), llava_batch(batch, processor.tokenizer, random.Random(0), asked=asked)
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


def check(folder: str, *, scenes: int = 200, asked: int = 5) -> dict[str, Any]:
    """All measurements of the model in `folder`."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    held_out = [make_scene(HELD_OUT_SEED + i) for i in range(scenes)]
    out: dict[str, Any] = {"float": measure(model, processor, held_out, asked)}
    cases = {"all-4": (tuple(p for part in PARTS.values() for p in part), 4)}
    cases |= {f"{part}-2": (prefixes, 2) for part, prefixes in PARTS.items()}
    for name, (prefixes, bits) in cases.items():
        with rounded(model, prefixes, QuantSpec(bits, 64)) as copy_:
            out[name] = measure(copy_, processor, held_out, asked)
    return out


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1]), indent=1))
