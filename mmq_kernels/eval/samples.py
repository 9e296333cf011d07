"""What data sets are made of: captioned images, questions with their answers, galleries to search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaptionSample:
    """An image and its reference captions."""

    image_id: int | str
    image: Path
    references: tuple[str, ...]

    @property
    def id(self) -> int | str:
        """What the publisher calls it."""
        return self.image_id


@dataclass(frozen=True)
class VqaSample:
    """A question about an image and its ten human answers."""

    question_id: int
    image: Path
    question: str
    answers: tuple[str, ...]
    answer_type: str
    question_type: str

    @property
    def id(self) -> int:
        """What the publisher calls it."""
        return self.question_id

    @property
    def common_answer(self) -> str:
        """The answer most people gave; of equally common ones, the first."""
        return Counter(self.answers).most_common(1)[0][0]

    @property
    def kinds(self) -> dict[str, str]:
        """By what accuracy is broken down."""
        return {"answer_type": self.answer_type, "question_type": self.question_type}


@dataclass(frozen=True)
class GqaSample:
    """A question about an image, its one answer, and the publisher's two classes of question."""

    question_id: str
    image: Path
    question: str
    answer: str
    structural_type: str
    semantic_type: str

    @property
    def id(self) -> str:
        """What the publisher calls it."""
        return self.question_id

    @property
    def answers(self) -> tuple[str, ...]:
        """The one answer."""
        return (self.answer,)

    @property
    def common_answer(self) -> str:
        """The one answer."""
        return self.answer

    @property
    def kinds(self) -> dict[str, str]:
        """By what accuracy is broken down; `open` and `binary` as GQA's own scorer has them."""
        open_ended = "open" if self.structural_type == "query" else "binary"
        return {
            "answer_type": open_ended,
            "structural_type": self.structural_type,
            "semantic_type": self.semantic_type,
        }


QuestionSample = VqaSample | GqaSample


@dataclass(frozen=True)
class RetrievalGallery:
    """Images and captions to be found by each other.

    Attributes:
        image_ids: one id an image.
        images: one path an image.
        captions: all captions, image by image.
        image_of: for each caption the index of its image.
    """

    image_ids: tuple[int | str, ...]
    images: tuple[Path, ...]
    captions: tuple[str, ...]
    image_of: tuple[int, ...]

    @classmethod
    def from_samples(cls, samples: Sequence[CaptionSample], captions_per_image: int | None = None) -> RetrievalGallery:
        """The gallery of `samples`, with the first `captions_per_image` of each image, or all."""
        pairs = [(i, text) for i, sample in enumerate(samples) for text in sample.references[:captions_per_image]]
        return cls(
            tuple(sample.image_id for sample in samples),
            tuple(sample.image for sample in samples),
            tuple(text for _, text in pairs),
            tuple(i for i, _ in pairs),
        )
