"""Training the retrieval miniature: contrastive and matching losses, with captions that are wrong in one thing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import Blip2ForImageTextRetrieval

from mmq_kernels.demo.architecture import ITM_TEXT_LENGTH, QFORMER_WIDTH, VISION_WIDTH, make_processor, make_retrieval
from mmq_kernels.demo.heads import PatchHead, SlotHead
from mmq_kernels.demo.loop import Schedule, train
from mmq_kernels.demo.samples import disturbed, draw_scenes, patch_labels, pixels, slot_labels
from mmq_kernels.demo.scenes import Scene, captions

ITM_STREAM = 2
TEMPERATURE = 0.05


def train_itm(
    vision: dict[str, Tensor],
    schedule: Schedule,
    *,
    seed: int,
    log: Path,
    device: str,
    save: Callable[[Blip2ForImageTextRetrieval], None],
) -> Blip2ForImageTextRetrieval:
    """Both heads of `Blip2ForImageTextRetrieval` together, with the auxiliary losses beside them."""
    torch.manual_seed(seed + 2)
    rng = random.Random(f"captions {seed}")
    model = make_retrieval()
    model.vision_model.load_state_dict(vision)
    model.to(device)  # type: ignore[arg-type]
    tokenizer = make_processor(retrieval=True).tokenizer
    patch_head = PatchHead(VISION_WIDTH).to(device)
    slot_head = SlotHead(QFORMER_WIDTH).to(device)

    def losses(step: int) -> dict[str, Tensor]:
        scenes = draw_scenes(step, schedule.batch, ITM_STREAM)
        labels, grounds = (t.to(device) for t in slot_labels(scenes))
        image = model.vision_model(pixels(scenes).to(device)).last_hidden_state
        ids, mask = (t.to(device) for t in _texts(scenes, tokenizer, rng))
        queries, similarity = _similarity(model, image, ids, mask)
        contrastive = _contrastive(similarity, scenes)
        early = schedule.early(step)
        return {
            "contrastive": contrastive,
            "matching": _matching(model, image, ids, mask, similarity.detach(), scenes, rng),
            "patch": 0.3 * early * patch_head(image[:, 1:], patch_labels(scenes).to(device)),
            "slot": 0.5 * early * slot_head(queries, labels, grounds),
        }

    modules = nn.ModuleDict({"model": model, "patch": patch_head, "slot": slot_head})
    train(modules, losses, schedule, name="itm", log=log, snapshot=lambda: save(model))
    return model


def _texts(scenes: list[Scene], tokenizer, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Token ids and mask of ``2 * scenes`` captions: the right ones, then one disturbed caption a scene."""
    texts = [rng.choice(captions(scene)) for scene in scenes]
    texts += [rng.choice(captions(disturbed(scene, rng))) for scene in scenes]
    plain = ["".join(c for c in text if c.isalnum() or c == " ") for text in texts]
    encoded = tokenizer(plain, padding=True, truncation=True, max_length=ITM_TEXT_LENGTH, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def _similarity(model: Blip2ForImageTextRetrieval, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Query outputs ``[images, queries, width]`` and cosine similarities ``[images, texts]``, best query each."""
    queries = model.qformer(
        query_embeds=model.query_tokens.expand(len(image), -1, -1), encoder_hidden_states=image
    ).last_hidden_state
    words = model.qformer(
        query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
    ).last_hidden_state[:, 0]
    seen = normalize(model.vision_projection(queries), dim=-1)
    said = normalize(model.text_projection(words), dim=-1)
    return queries, torch.einsum("iqd,td->iqt", seen, said).amax(1)


def _contrastive(similarity: Tensor, scenes: list[Scene]) -> Tensor:
    """InfoNCE both ways; the disturbed captions are further negatives of the images."""
    count = len(scenes)
    target = torch.arange(count, device=similarity.device)
    logits = similarity / TEMPERATURE
    same = torch.tensor([[a.identity == b.identity for b in scenes] for a in scenes], device=logits.device)
    same.fill_diagonal_(False)
    masked = torch.cat([logits[:, :count].masked_fill(same, -1e4), logits[:, count:]], 1)
    return 0.5 * (cross_entropy(masked, target) + cross_entropy(masked[:, :count].t(), target))


def _matching(
    model: Blip2ForImageTextRetrieval,
    image: Tensor,
    ids: Tensor,
    mask: Tensor,
    similarity: Tensor,
    scenes: list[Scene],
    rng: random.Random,
) -> Tensor:
    """Does the text fit the image? Right pairs, disturbed captions, and the hardest other caption of the batch."""
    count = len(scenes)
    other = similarity[:, :count].clone() / TEMPERATURE
    for i, a in enumerate(scenes):
        for j, b in enumerate(scenes):
            if a.identity == b.identity:
                other[i, j] = -1e4
    hard = torch.multinomial(other.softmax(1) + 1e-9, 1)[:, 0].cpu()
    order = torch.arange(count)
    texts = torch.cat([order, order + count, hard])
    images = image[order.repeat(3)]
    queries = model.query_tokens.expand(len(images), -1, -1)
    embedded = model.embeddings(input_ids=ids[texts], query_embeds=queries)
    full = torch.cat([mask.new_ones(len(images), queries.shape[1]), mask[texts]], 1)
    out = model.qformer(
        query_embeds=embedded,
        query_length=queries.shape[1],
        attention_mask=full,
        encoder_hidden_states=images,
    ).last_hidden_state[:, : queries.shape[1]]
    logits = model.itm_head(out).mean(1)
    target = torch.cat([torch.ones(count), torch.zeros(2 * count)]).long().to(logits.device)
    return cross_entropy(logits, target, weight=logits.new_tensor([0.5, 1.0]))
