"""METEOR 1.5 by pycocoevalcap's jar, in a Java process that always ends.

Source: Denkowski and Lavie, "Meteor Universal" (2014); the line protocol is that of the jar's -stdio.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pycocoevalcap.meteor import meteor as packaged

from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.tokenization import java

_SEPARATOR = " ||| "
_END_SECONDS = 10.0
_CHUNKS = 20
"""Place of the chunks among the counts; matched words of caption and reference follow."""


Scores = tuple[float, list[float], list[list[float]]]


def meteor_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """METEOR of the corpus and of each hypothesis, all tokenized text; and the counts that it is made of (`corpus`).

    Raises:
        DataError: Java is missing or the scorer stopped.
    """
    with Meteor() as meteor:
        return meteor.scores(hypotheses, references)


class Meteor:
    """The Java process, for any number of sets: it takes seconds to start. Ends with the context, or with `close`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def scores(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        """See `meteor_scores`."""
        if self._process is None:
            self._process = _start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None  # both were asked for as pipes
        try:
            return _converse(process.stdin, process.stdout, hypotheses, references)
        except (BrokenPipeError, ValueError) as error:
            self.close()
            raise DataError(f"the METEOR scorer stopped: {error}") from None

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _start() -> subprocess.Popen[str]:
    program = java()
    if program is None:
        raise DataError("METEOR needs Java, and no java is on the PATH")
    folder = Path(packaged.__file__).parent
    command = [
        *(program, "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", packaged.METEOR_JAR),
        *("-", "-", "-stdio", "-l", "en", "-norm"),
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )


def _converse(
    question: IO[str], answer: IO[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> Scores:
    def ask(line: str) -> str:
        question.write(line + "\n")
        question.flush()
        return answer.readline().strip()

    statistics = [
        ask(_SEPARATOR.join(("SCORE", *(_clean(text) for text in texts), _clean(hypothesis))))
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    first = float(ask(_SEPARATOR.join(("EVAL", *statistics))))
    scores = [first, *(float(answer.readline()) for _ in hypotheses[1:])]
    counts = [_counts(line) for line in statistics]
    return float(answer.readline()), scores, counts


def _counts(line: str) -> list[float]:
    """What the jar counted in a caption; one that is its reference has no chunks, as in the jar's sums."""
    counts = [float(number) for number in line.split()]
    lengths, chunks, matched = counts[:2], counts[_CHUNKS], counts[_CHUNKS + 1 :]
    return [*counts[:_CHUNKS], 0.0 if chunks == 1 and matched == lengths else chunks, *matched]


def _clean(text: str) -> str:
    return " ".join(text.replace("|||", " ").split())


def _end(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it may have gone already
            process.stdin.close()
    try:
        process.wait(timeout=_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
