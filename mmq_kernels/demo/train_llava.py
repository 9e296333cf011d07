"""Training the miniature LLaVA: its CLIP tower alone, then all of it on captions and questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mmq_kernels.demo.architecture import ASK, BOS, DESCRIBE, PATCHES, VISION_WIDTH, make_llava, make_llava_processor
from mmq_kernels.demo.heads import PatchHead
from mmq_kernels.demo.loop import Schedule, train
from mmq_kernels.demo.samples import IGNORED, Scene, TextBatch, answered, draw_scenes, packed, patch_labels, pixels
from mmq_kernels.demo.scenes import captions, questions

ASKED = 4
"""Questions an image in a training step."""

TOWER_STREAM, LLAVA_STREAM = 4, 5


def train_llava(
    tower: Schedule,
    rounds: Sequence[Schedule],
    *,
    seed: int,
    log: Path,
    device: str,
    save: Callable[[LlavaForConditionalGeneration], None],
) -> LlavaForConditionalGeneration:
    """The tower under a dense loss on its patches, then everything on texts with that loss beside them."""
    torch.manual_seed(seed)
    model = make_llava()
    model.to(device)  # type: ignore[arg-type]
    head = PatchHead(VISION_WIDTH).to(device)
    vision = model.model.vision_tower

    def tower_losses(step: int) -> dict[str, Tensor]:
        scenes = draw_scenes(step, tower.batch, TOWER_STREAM)
        patches = _patches(model, pixels(scenes).to(device))
        return {"patch": head(patches, patch_labels(scenes).to(device))}

    parts = nn.ModuleDict({"vision": vision, "head": head})
    train(parts, tower_losses, tower, name="llava tower", log=log, snapshot=lambda: None)

    first = 0
    for number, schedule in enumerate(rounds):
        train_round(model, head, schedule, number, first, seed=seed, log=log, save=save)
        first += schedule.steps
    return model


def train_round(
    model: LlavaForConditionalGeneration,
    head: PatchHead,
    schedule: Schedule,
    number: int,
    first: int,
    *,
    seed: int,
    log: Path,
    save: Callable[[LlavaForConditionalGeneration], None],
) -> None:
    """Round `number`, whose scenes go on behind those of the `first` steps before it, with a new optimizer."""
    device = model.device
    rng = random.Random(f"questions {seed} {number}")
    tokenizer = make_llava_processor().tokenizer

    def losses(step: int) -> dict[str, Tensor]:
        scenes = draw_scenes(first + step, schedule.batch, LLAVA_STREAM)
        batch = llava_batch(scenes, tokenizer, rng, asked=ASKED)
        patches, caption, answer = llava_losses(model, pixels(scenes).to(device), batch)
        beside = 0.3 * schedule.early(step) * head(patches, patch_labels(scenes).to(device))
        return {"caption": caption, "answer": answer, "patch": beside}

    parts = nn.ModuleDict({"model": model, "head": head})
    train(parts, losses, schedule, name="llava", log=log, snapshot=lambda: save(model))


def llava_batch(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, rng: random.Random, *, asked: int
) -> TextBatch:
    """A caption and `asked` questions an image, as the chat template puts them, behind `<s>` and the patches."""
    rows = []
    for scene in scenes:
        texts = [(DESCRIBE, captions(scene)[0])]
        texts += [(ASK.format(q.text), q.answer) for q in questions(scene, asked, rng)]
        rows.append([_text(tokenizer, said, target) for said, target in texts])
    return packed(rows, 1 + PATCHES)


def _text(tokenizer: PreTrainedTokenizerFast, said: str, target: str) -> tuple[list[int], list[int]]:
    return answered(tokenizer(f"{said} ASSISTANT:", add_special_tokens=False).input_ids, tokenizer, target)


def _patches(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Features ``[images, patches, width]``, those that the projector gets."""
    tower = model.model.vision_tower
    return tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]


def llava_losses(
    model: LlavaForConditionalGeneration, pixel_values: Tensor, batch: TextBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Patch features, and the mean losses of caption and answer tokens; the image is encoded once for its texts."""
    patches = _patches(model, pixel_values)
    device = patches.device
    embed = model.get_input_embeddings()
    start = embed(torch.full((len(patches), 1), BOS, device=device))
    inputs = torch.cat([start, model.model.multi_modal_projector(patches), embed(batch.ids.to(device))], 1)
    allowed = batch.mask.to(device)
    mask = torch.zeros_like(allowed, dtype=inputs.dtype).masked_fill(~allowed, torch.finfo(inputs.dtype).min)
    hidden = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=batch.positions.to(device), use_cache=False
    ).last_hidden_state[:, -batch.ids.shape[1] :]
    labels, is_answer = batch.labels.to(device), batch.is_answer.to(device)
    wanted = labels != IGNORED
    loss = cross_entropy(model.lm_head(hidden[wanted]), labels[wanted], reduction="none")
    answers = is_answer[wanted]
    return patches, loss[~answers].mean(), loss[answers].mean()
