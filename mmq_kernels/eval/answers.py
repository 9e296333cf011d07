"""VQAv2's accuracy: the official answer normalization and the ten-answer rule; and GQA's: the one answer, or not.

An answer to VQAv2 is as right as people agree on it: ``mean over the 10 subsets of 9 people of min(1, matches / 3)``.

Source: Antol et al., "VQA: Visual Question Answering", and the challenge's evaluation
(visualqa.org/evaluation), whose quirks are kept because published numbers contain them: normalization is
skipped where all people agree, and a comma between digits (1,000) makes every punctuation mark vanish instead
of turning into a space.

GQA's scorer (Hudson and Manning, "GQA", 2019, its eval.py) compares answers as they are, which are lower case;
a model's is made so first, as LLaVA's authors do: case, surrounding space and a final period do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
ENOUGH = 3
"""People who must agree with an answer for it to count fully."""

_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32
"""Periods removed at most: the official script passes a flag of that value where a count belongs."""

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {spelling: word for word in _CONTRACTED.split() for spelling in _without_one_apostrophe(word)}
"""A contraction that lost one apostrophe, and the contraction."""

CONTRACTIONS["somebody'd"] = "somebodyd"  # sic, in the official table


def normalize_answer(answer: str) -> str:
    """`answer` in the form in which answers are compared: no punctuation or articles, lower case, digits.

    >>> normalize_answer("The two  dogs, (dont know).")
    "2 dogs don't know"
    """
    words = [NUMBERS.get(word, word) for word in _strip_punctuation(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1] of `prediction` against the human `answers` (ten in VQAv2)."""
    prediction, people = _tidy(prediction), [_tidy(answer) for answer in answers]
    if len(set(people)) > 1:
        prediction, people = normalize_answer(prediction), [normalize_answer(answer) for answer in people]
    matches = [answer == prediction for answer in people]
    total = sum(matches)
    return sum(min(1.0, (total - match) / ENOUGH) for match in matches) / len(matches)


def exact_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where `prediction` is one of `answers` (one in GQA), but for case, space and a final period; else 0.0.

    >>> exact_accuracy("Light Blue.", ["light blue"])
    1.0
    """
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def _tidy(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    number = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or number else " ")
    return _PERIOD.sub("", stripped, count=_PERIODS)
