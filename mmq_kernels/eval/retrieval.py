"""Retrieval in both directions: contrastive ranking, and a re-ranking of its best by the matching head.

``similarity[i, t] = max_q <image_embedding[i, q], text_embedding[t]>``; the `top_k` most similar are ordered
anew by ``match_logit + similarity`` and stay in front of all others. A rank counts the wrong items that score
at least as high as the best right one: a tie, or a score that is no number, never helps.

Source: Li et al., "BLIP-2" (2023), and its evaluation in LAVIS.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmq_kernels.eval.datasets import RetrievalGallery
from mmq_kernels.eval.images import PixelStore
from mmq_kernels.eval.matching import MatchingModel, RetrievalModel
from mmq_kernels.eval.predictions import Entry
from mmq_kernels.eval.team import Progress, Tally
from mmq_kernels.eval.work import Effort, Sharing

TOP_K = 128
"""Candidates re-ranked in each direction."""

RECALLS = (1, 5, 10)
Ranks = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]


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
    sharing: Sharing | None = None,
    effort: Effort | None = None,
) -> RetrievalScores:
    """Ranks `gallery` in both directions.

    Args:
        top_k: candidates to re-rank a direction, clipped to the gallery; 0 ranks by similarity only, and so does a
            dual encoder, whatever is asked.
        batch_size: images or texts a forward pass; so many images are a chunk, which one rank embeds.
        progress: called with (pieces of work done, pieces in all).
        sharing: which ranks share the work, and where it is kept; then it tells progress too. All get the scores.
        effort: that of all ranks is put here.

    Raises:
        ValueError: a negative `top_k`.
    """
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    top_k = top_k if isinstance(model, MatchingModel) else 0
    images, texts = len(gallery.images), len(gallery.captions)
    search = _Search(model, gallery, pixels, top_k, batch_size, sharing or Sharing(progress=progress))
    similarity = search.similarity()
    contrastive = rank(similarity, gallery.image_of)
    if top_k:
        asked = candidates(similarity, top_k) | candidates(similarity.T, top_k).T
        matched = search.matched(asked)
    search.finish(effort)
    if not top_k:
        return RetrievalScores(contrastive, None, 0, 0)
    ranking = rerank(similarity, matched, gallery.image_of, top_k)
    return RetrievalScores(contrastive, ranking, min(top_k, max(images, texts)), int(asked.sum()))


class _Search:
    """Scores of one gallery: what is kept of them, and what this rank and the others add.

    A rank that embeds a chunk of images holds on to their features and matches them too.
    """

    def __init__(
        self,
        model: RetrievalModel,
        gallery: RetrievalGallery,
        pixels: PixelStore,
        top_k: int,
        batch_size: int,
        sharing: Sharing,
    ) -> None:
        self._model, self._gallery, self._pixels = model, gallery, pixels
        self._batch_size, self._sharing = batch_size, sharing
        self._rows = [model.encode_text(text) for text in gallery.captions]
        self._kept: dict[tuple[str, int], Entry] = {(each["kind"], each["sample"]): each for each in sharing.log.kept}
        self._vision: dict[int, Tensor] = {}
        self._effort, self._worked = Effort(), set[int]()
        images, texts = len(gallery.images), len(self._rows)
        self._starts = range(0, images, batch_size)
        self._unseen = [start for start in self._starts if not self._has("similarity", start)]
        self._unmatched = [start for start in self._starts if not self._has("match", start)] if top_k else []
        seen = images - sum(len(self._chunk(start)) for start in self._unseen)
        matched = sum(("match", i) in self._kept for i in range(images)) if top_k else 0
        total = texts + images + (images if top_k else 0)
        self._tally = Tally(sharing.team, total, sharing.progress, seen + matched + (0 if self._unseen else texts))

    def _chunk(self, start: int) -> range:
        return range(start, min(start + self._batch_size, len(self._gallery.images)))

    def _has(self, kind: str, start: int) -> bool:
        return all((kind, i) in self._kept for i in self._chunk(start))

    def similarity(self) -> Scores:
        """``[images, texts]``, on every rank."""
        found = np.empty((len(self._gallery.images), len(self._rows)))
        for i in range(len(found)):
            if ("similarity", i) in self._kept:
                found[i] = _values(self._kept["similarity", i], np.float32)
        fresh: dict[int, Floats] = {}
        with self._effort.stage("retrieval"):
            embedded = self._embed_texts() if self._unseen else None
            for turn in self._sharing.team.deal(len(self._unseen)):
                chunk = self._chunk(self._unseen[turn])
                features, queries = self._embed_images(chunk)
                assert embedded is not None
                best = torch.einsum("iqd,td->itq", queries.float(), embedded).amax(-1).cpu().numpy()
                self._sharing.log.write([_entry("similarity", i, row) for i, row in zip(chunk, best, strict=True)])
                if chunk.start in self._unmatched:
                    self._vision[chunk.start] = features
                fresh |= dict(zip(chunk, best, strict=True))
                self._tally.add(len(chunk))
        for part in self._sharing.team.gather(fresh):
            for i, row in part.items():
                found[i] = row
        return found

    def _embed_images(self, chunk: range) -> tuple[Tensor, Tensor]:
        self._worked.update(chunk)
        return self._model.embed_images(self._pixels(self._gallery.images[chunk.start : chunk.stop]))

    def _embed_texts(self) -> Tensor:
        """Embeddings ``[texts, dim]`` in float32, on every rank, computed in batches of like length."""
        rows = self._rows
        order = sorted(range(len(rows)), key=lambda t: len(rows[t]))
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        parts: dict[int, Floats] = {}
        device = self._model.model.device
        for number in self._sharing.team.deal(len(batches)):
            embedded = self._model.embed_texts([rows[t] for t in batches[number]])
            parts[number] = embedded.float().cpu().numpy()
            self._tally.add(len(batches[number]))
        parts = {number: part for others in self._sharing.team.gather(parts) for number, part in others.items()}
        embedded = torch.from_numpy(np.concatenate([parts[number] for number in range(len(batches))]))
        return embedded[torch.tensor(np.argsort(order))].to(device)

    def matched(self, asked: Flags) -> Scores:
        """Match logits ``[images, texts]`` of the pairs that are `asked`, on every rank; others stay no number."""
        found = np.full(asked.shape, np.nan)
        fresh: dict[int, Floats] = {}
        with self._effort.stage("retrieval"):
            for chunk, features in self._to_match():
                for i in chunk:
                    if ("match", i) not in self._kept:
                        fresh[i] = self._match(features[i - chunk.start : i - chunk.start + 1], asked[i])
                        self._sharing.log.write([_entry("match", i, fresh[i])])
                        self._tally.add(1)
        old = {i: _values(entry, np.float64) for (kind, i), entry in self._kept.items() if kind == "match"}
        for part in [old, *self._sharing.team.gather(fresh)]:
            for i, values in part.items():
                found[i, asked[i]] = values
        return found

    def _to_match(self) -> Iterator[tuple[range, Tensor]]:
        """Chunks that this rank embedded, and then those that an earlier run did, as they are dealt out."""
        for start in list(self._vision):
            yield self._chunk(start), self._vision.pop(start)
        left = [start for start in self._unmatched if start not in self._unseen]
        for turn in self._sharing.team.deal(len(left)):
            chunk = self._chunk(left[turn])
            yield chunk, self._embed_images(chunk)[0]

    def _match(self, vision: Tensor, asked: Flags) -> Floats:
        """Match logits of the `asked` texts with one image, in order."""
        model = self._model
        assert isinstance(model, MatchingModel)  # none else is asked to
        chosen = np.flatnonzero(asked).tolist()
        order = sorted(range(len(chosen)), key=lambda at: len(self._rows[chosen[at]]))
        logits = np.empty(len(chosen))
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            logits[part] = model.match(vision, [self._rows[chosen[at]] for at in part]).double().cpu().numpy()
        return logits

    def finish(self, effort: Effort | None) -> None:
        """Waits for the other ranks, and adds the effort of all."""
        self._tally.wait()
        self._effort.samples = len(self._worked)
        whole = Effort.of_all(self._sharing.team.gather(self._effort))
        if effort is not None:
            effort.seconds, effort.samples = whole.seconds, whole.samples


def _entry(kind: str, image: int, values: Floats) -> Entry:
    return {"kind": kind, "sample": image, "values": base64.b64encode(values.tobytes()).decode()}


def _values(entry: Entry, dtype: Any) -> Floats:
    return np.frombuffer(base64.b64decode(entry["values"]), dtype)
