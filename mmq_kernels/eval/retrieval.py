"""Retrieval in both directions: contrastive ranking, and a re-ranking of its best by the matching head.

``similarity[i, t] = max_q <image_embedding[i, q], text_embedding[t]>``; the `top_k` most similar are ordered
anew by ``match_logit + similarity`` and stay in front of all others. A rank counts the wrong items that score
at least as high as the best right one: a tie, or a score that is no number, never helps.

Source: Li et al., "BLIP-2" (2023), and its evaluation in LAVIS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmq_kernels.eval.datasets import RetrievalGallery
from mmq_kernels.eval.images import PixelStore
from mmq_kernels.eval.matching import MatchingModel, RetrievalModel

TOP_K = 128
"""Candidates re-ranked in each direction."""

RECALLS = (1, 5, 10)
Ranks = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ranking:
    """How many wrong items stood before the best right one: 0 is a hit at 1.

    Attributes:
        text: for each image, among the captions.
        image: for each caption, among the images.
    """

    text: Ranks
    image: Ranks

    def recalls(self) -> dict[str, float]:
        """R@1, R@5 and R@10 both ways, as fractions: `text_r1` .. `image_r10`."""
        return {
            f"{direction}_r{k}": float(np.mean(ranks < k))
            for direction, ranks in (("text", self.text), ("image", self.image))
            for k in RECALLS
        }


def rank(similarity: Scores, image_of: Sequence[int]) -> Ranking:
    """The ranking by a matrix of scores.

    Args:
        similarity: ``[images, texts]``; what is no number counts as the lowest score.
        image_of: for each text the index of its image.
    """
    right = _right(similarity, image_of)
    everything = np.ones_like(right)
    return Ranking(_ranks(similarity, right, everything), _ranks(similarity.T, right.T, everything.T))


def rerank(similarity: Scores, matched: Scores, image_of: Sequence[int], top_k: int) -> Ranking:
    """The ranking in which the `top_k` of each direction are ordered by match and similarity, before all
    others.

    Args:
        similarity: ``[images, texts]``.
        matched: ``[images, texts]`` match logits; used where the pair is a candidate in the direction at
        hand.
    """
    right, total = _right(similarity, image_of), similarity + matched
    return Ranking(
        _reranked(total, similarity, right, candidates(similarity, top_k)),
        _reranked(total.T, similarity.T, right.T, candidates(similarity.T, top_k)),
    )


def candidates(scores: Scores, top_k: int) -> Flags:
    """The `top_k` highest of each row (or all of it), bool ``[rows, columns]``; ties by column."""
    order = np.argsort(-_numbers(scores), axis=1, kind="stable")[:, :top_k]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def _right(scores: Scores, image_of: Sequence[int]) -> Flags:
    return np.asarray(image_of)[None, :] == np.arange(len(scores))[:, None]


def _numbers(scores: Scores) -> Scores:
    return np.where(np.isnan(scores), -np.inf, scores)


def _ranks(scores: Scores, right: Flags, considered: Flags) -> Ranks:
    """Wrong items of each row that score at least as high as its best right one, among the considered."""
    scores = _numbers(scores)
    best = np.where(right & considered, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~right & considered).sum(axis=1)


def _reranked(total: Scores, similarity: Scores, right: Flags, chosen: Flags) -> Ranks:
    inside = _ranks(total, right, chosen)
    outside = chosen.sum(axis=1) + _ranks(similarity, right, ~chosen)
    return np.where((right & chosen).any(axis=1), inside, outside)


@dataclass(frozen=True)
class RetrievalScores:
    """Both rankings of a gallery.

    Attributes:
        contrastive: by similarity alone.
        matched: after re-ranking; None where it was not asked for.
        top_k: candidates re-ranked a direction, after clipping to the gallery.
        pairs: image-text pairs that the matching head saw.
    """

    contrastive: Ranking
    matched: Ranking | None
    top_k: int
    pairs: int


def score_gallery(
    model: RetrievalModel,
    gallery: RetrievalGallery,
    pixels: PixelStore,
    *,
    top_k: int = TOP_K,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> RetrievalScores:
    """Ranks `gallery` in both directions.

    Args:
        top_k: candidates to re-rank a direction, clipped to the gallery; 0 ranks by similarity only, and so does a
            dual encoder, whatever is asked.
        batch_size: images or texts a forward pass.
        progress: called with (pieces of work done, pieces in all).

    Raises:
        ValueError: a negative `top_k`.
    """
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    top_k = top_k if isinstance(model, MatchingModel) else 0
    images, texts = len(gallery.images), len(gallery.captions)
    rows = [model.encode_text(text) for text in gallery.captions]
    done, todo = 0, images + texts + (images if top_k else 0)

    def advance(pieces: int) -> None:
        nonlocal done
        done += pieces
        if progress is not None:
            progress(done, todo)

    embedded = _embed_texts(model, rows, batch_size)
    advance(texts)
    similarity = np.empty((images, texts))
    vision: list[Tensor] = []
    for start in range(0, images, batch_size):
        paths = gallery.images[start : start + batch_size]
        features, queries = model.embed_images(pixels(paths))
        best = torch.einsum("iqd,td->itq", queries.float(), embedded).amax(-1)
        similarity[start : start + len(paths)] = best.double().cpu().numpy()
        vision.extend(features.split(1) if top_k else ())
        advance(len(paths))
    contrastive = rank(similarity, gallery.image_of)
    if not top_k:
        return RetrievalScores(contrastive, None, 0, 0)
    asked = candidates(similarity, top_k) | candidates(similarity.T, top_k).T
    matched = np.full(similarity.shape, np.nan)
    assert isinstance(model, MatchingModel)  # none else has a top_k here
    for i, features in enumerate(vision):
        matched[i] = _match_image(model, features, rows, np.flatnonzero(asked[i]), batch_size)
        advance(1)
    ranking = rerank(similarity, matched, gallery.image_of, top_k)
    return RetrievalScores(contrastive, ranking, min(top_k, max(images, texts)), int(asked.sum()))


def _embed_texts(model: RetrievalModel, rows: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Embeddings ``[texts, dim]`` in float32, computed in batches of like length."""
    order = sorted(range(len(rows)), key=lambda t: len(rows[t]))
    parts = [
        model.embed_texts([rows[t] for t in order[start : start + batch_size]]).float()
        for start in range(0, len(order), batch_size)
    ]
    embedded = torch.cat(parts)
    return embedded[torch.tensor(np.argsort(order), device=embedded.device)]


def _match_image(
    model: MatchingModel,
    vision: Tensor,
    rows: Sequence[Sequence[int]],
    chosen: npt.NDArray[np.int64],
    batch_size: int,
) -> Scores:
    """Match logits ``[texts]`` of the `chosen` texts with one image; the others stay no number."""
    scores = np.full(len(rows), np.nan)
    order = sorted(chosen.tolist(), key=lambda t: len(rows[t]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        scores[part] = model.match(vision, [rows[t] for t in part]).double().cpu().numpy()
    return scores
