"""What is asked of a model about each sample, and the record of what it said: the keys of files of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from mmq_kernels.eval.datasets import QuestionSample, RetrievalGallery
from mmq_kernels.eval.predictions import Entry, Record
from mmq_kernels.eval.prepared import Prepared
from mmq_kernels.eval.protocol import Protocol, clean_caption
from mmq_kernels.eval.retrieval import RetrievalScores
from mmq_kernels.eval.work import Query, Reply


def queries_of(data: Prepared, protocol: Protocol, nll_references: str | None) -> list[Query]:
    """One query a sample.

    Args:
        nll_references: whose likelihood is measured: of a caption's references the `first` or `all`; None for none.
    """
    if data.task == "caption":
        wanted = None if nll_references == "all" else 1 if nll_references else 0
        return [
            Query(sample.image, protocol.text(), tuple(clean_caption(text) for text in sample.references[:wanted]))
            for sample in data.caption_samples()
        ]
    return [
        Query(sample.image, protocol.text(sample.question), (sample.common_answer,) if nll_references else ())
        for sample in _questions(data)
    ]


def records_of(data: Prepared, replies: Sequence[Reply]) -> list[Record]:
    """One record a sample, before it is scored: scores are None where they will be."""
    record = _caption_record if data.task == "caption" else _question_record
    samples = cast("list[Any]", data.samples)
    return [record(data, sample, reply) for sample, reply in zip(samples, replies, strict=True)]


def entries_of(data: Prepared, records: Sequence[Record]) -> list[Entry]:
    """What a log would have kept of `records`, which may be some of all; nothing for ranks in a gallery, each of which
    depends on all images and captions.
    """
    if data.task == "retrieval":
        return []
    numbers = {sample.id: number for number, sample in enumerate(cast("list[Any]", data.samples))}
    text = "caption" if data.task == "caption" else "prediction"
    return [
        {
            "sample": numbers[record["id"]],
            "text": record.get(text),
            "nll": record.get("nll"),
            "nll_tokens": record.get("nll_tokens", 0),
        }
        for record in records
    ]


def _caption_record(data: Prepared, sample: Any, reply: Reply) -> Record:
    return {
        "id": sample.image_id,
        "image": _name(data, sample),
        **({} if reply.text is None else {"caption": reply.text, "cider": None}),
        "references": list(sample.references),
        **_likelihood(reply),
    }


def _question_record(data: Prepared, sample: QuestionSample, reply: Reply) -> Record:
    return {
        "id": sample.question_id,
        "image": _name(data, sample),
        "question": sample.question,
        **({} if reply.text is None else {"prediction": reply.text}),
        "answers": list(sample.answers),
        **sample.kinds,
        **({} if reply.text is None else {"accuracy": None}),
        **_likelihood(reply),
    }


def gallery_records(data: Prepared, scores: RetrievalScores) -> list[Record]:
    """One record an image and one a caption, with the rank of the best right one for it, before and after matching."""
    gallery = cast(RetrievalGallery, data.samples)
    names = [path.relative_to(data.folder).as_posix() for path in gallery.images]
    final, contrastive = scores.matched or scores.contrastive, scores.contrastive
    images = [
        {
            "kind": "image",
            "id": gallery.image_ids[i],
            "image": names[i],
            "text_rank": int(final.text[i]),
            "text_rank_contrastive": int(contrastive.text[i]),
        }
        for i in range(len(names))
    ]
    captions = [
        {
            "kind": "caption",
            "id": t,
            "image": names[gallery.image_of[t]],
            "caption": gallery.captions[t],
            "image_rank": int(final.image[t]),
            "image_rank_contrastive": int(contrastive.image[t]),
        }
        for t in range(len(gallery.captions))
    ]
    return images + captions


def _questions(data: Prepared) -> list[QuestionSample]:
    return cast("list[QuestionSample]", data.samples)


def _name(data: Prepared, sample: Any) -> str:
    return sample.image.relative_to(data.folder).as_posix()


def _likelihood(reply: Reply) -> Record:
    return {} if reply.nll is None else {"nll": reply.nll, "nll_tokens": reply.nll_tokens}
