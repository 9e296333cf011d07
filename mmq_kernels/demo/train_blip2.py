"""Training the two vision stages of the miniatures: the ViT alone, then BLIP-2 on captions and questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Blip2ForConditionalGeneration

from mmq_kernels.demo.architecture import QFORMER_WIDTH, VISION_WIDTH, make_blip2, make_processor
from mmq_kernels.demo.heads import PatchHead, SlotHead
from mmq_kernels.demo.loop import Schedule, train
from mmq_kernels.demo.samples import (
    IGNORED,
    TextBatch,
    draw_scenes,
    patch_labels,
    pixels,
    slot_labels,
    text_batch,
)

ASKED = 5
"""Questions an image in a training step."""

VISION_STREAM, BLIP2_STREAM = 0, 1


def train_vision(schedule: Schedule, *, seed: int, log: Path, device: str) -> dict[str, Tensor]:
    """The ViT under a dense loss on its patches; returns its state."""
    torch.manual_seed(seed)
    vit = make_blip2().vision_model.to(device)
    head = PatchHead(vit.config.hidden_size).to(device)

    def losses(step: int) -> dict[str, Tensor]:
        scenes = draw_scenes(step, schedule.batch, VISION_STREAM)
        features = vit(pixels(scenes).to(device)).last_hidden_state[:, 1:]
        return {"patch": head(features, patch_labels(scenes).to(device))}

    train(
        nn.ModuleDict({"vit": vit, "head": head}),
        losses,
        schedule,
        name="vision",
        log=log,
        snapshot=lambda: None,
    )
    return {name: tensor.cpu() for name, tensor in vit.state_dict().items()}


@dataclass(frozen=True)
class Round:
    """One of the rounds in which BLIP-2 learns captions and questions; each starts with a new optimizer.

    Attributes:
        schedule: of the round.
        wordings: how many of a scene's captions it is taught.
        taught: whether also the questions that no data set asks.
    """

    schedule: Schedule
    wordings: int
    taught: bool = False


def train_blip2(
    vision: dict[str, Tensor],
    rounds: Sequence[Round],
    *,
    seed: int,
    log: Path,
    device: str,
    save: Callable[[Blip2ForConditionalGeneration], None],
) -> Blip2ForConditionalGeneration:
    """Captions and questions together, with the auxiliary losses beside them, in rounds with warm restarts.

    Why rounds, and why these, is what was tried and not what was proved: the weights' README lists the attempts.
    """
    torch.manual_seed(seed + 1)
    model = make_blip2()
    model.vision_model.load_state_dict(vision)
    model.to(device)  # type: ignore[arg-type]
    first = 0
    for number, round_ in enumerate(rounds):
        train_round(model, round_, number, first, seed=seed, log=log, save=save)
        first += round_.schedule.steps
    return model


def train_round(
    model: Blip2ForConditionalGeneration,
    round_: Round,
    number: int,
    first: int,
    *,
    seed: int,
    log: Path,
    save: Callable[[Blip2ForConditionalGeneration], None],
) -> None:
    """Round `number`, whose scenes go on behind those of the `first` steps before it."""
    device = model.device
    torch.manual_seed(seed + 10 * (number + 1))
    rng = random.Random(f"questions {seed} {number}")
    tokenizer = make_processor(retrieval=False).tokenizer
    patch_head = PatchHead(VISION_WIDTH).to(device)
    slot_head = SlotHead(QFORMER_WIDTH).to(device)
    schedule = round_.schedule

    def losses(step: int) -> dict[str, Tensor]:
        scenes = draw_scenes(first + step, schedule.batch, BLIP2_STREAM)
        batch = text_batch(scenes, tokenizer, rng, asked=ASKED, wordings=round_.wordings, taught=round_.taught)
        labels, grounds = (t.to(device) for t in slot_labels(scenes))
        patches, queries, caption, answer = packed_losses(model, pixels(scenes).to(device), batch)
        early = schedule.early(step)
        return {
            "caption": caption,
            "answer": answer,
            "patch": 0.3 * early * patch_head(patches, patch_labels(scenes).to(device)),
            "slot": 0.5 * early * slot_head(queries, labels, grounds),
        }

    modules = nn.ModuleDict({"model": model, "patch": patch_head, "slot": slot_head})
    train(modules, losses, schedule, name="blip2", log=log, snapshot=lambda: save(model))


def packed_losses(
    model: Blip2ForConditionalGeneration, pixel_values: Tensor, batch: TextBatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patch features, query outputs, and the mean losses of caption and answer tokens.

    The image is encoded once for all the texts packed behind it.
    """
    image = model.vision_model(pixel_values).last_hidden_state
    queries = model.qformer(
        query_embeds=model.query_tokens.expand(len(image), -1, -1), encoder_hidden_states=image
    ).last_hidden_state
    device = image.device
    words = model.get_input_embeddings()(batch.ids.to(device))
    inputs = torch.cat([model.language_projection(queries), words], 1)
    allowed = batch.mask.to(device)
    mask = torch.zeros_like(allowed, dtype=inputs.dtype).masked_fill(~allowed, torch.finfo(inputs.dtype).min)
    hidden = model.language_model.model.decoder(
        inputs_embeds=inputs, attention_mask=mask, position_ids=batch.positions.to(device), use_cache=False
    ).last_hidden_state[:, -batch.ids.shape[1] :]
    labels, is_answer = batch.labels.to(device), batch.is_answer.to(device)
    wanted = labels != IGNORED
    loss = cross_entropy(model.language_model.lm_head(hidden[wanted]), labels[wanted], reduction="none")
    answers = is_answer[wanted]
    return image[:, 1:], queries, loss[~answers].mean(), loss[answers].mean()
