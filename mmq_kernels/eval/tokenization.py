"""Tokenization of captions before they are scored.

`ptb` is the official one (Stanford's PTBTokenizer, lower case, punctuation dropped; needs Java). `plain`
needs nothing: lower case, words and numbers, clitics split off as PTB does. Scores of the two differ,
so a result always names its tokenization.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from mmq_kernels.eval.errors import DataError

TOKENIZERS = ("ptb", "plain")

_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)
_CLITIC = re.compile(r"(n't|'(?:s|m|d|re|ve|ll))\b")
_WORD = re.compile(r"n't|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:/]\d+)+|\w+(?:-\w+)*|[^\w\s]")
_BATCH_SECONDS = 600.0


def java() -> str | None:
    """The `java` program on the PATH, or None."""
    return shutil.which("java")


def choose_tokenizer(asked: str) -> str:
    """`ptb` or `plain`; `auto` is `ptb` where Java is found.

    Raises:
        ValueError: unknown name.
        DataError: `ptb` was asked for and there is no Java.
    """
    if asked == "auto":
        return "ptb" if java() else "plain"
    if asked not in TOKENIZERS:
        raise ValueError(f"tokenizer must be one of auto, {', '.join(TOKENIZERS)}, got {asked!r}")
    if asked == "ptb" and not java():
        raise DataError("tokenizer ptb needs Java, and no java is on the PATH: install it or ask for plain")
    return asked


def tokenize(captions: Sequence[str], tokenizer: str) -> list[str]:
    """`captions` as space-separated tokens, one string each."""
    lines = [" ".join(caption.split()) for caption in captions]
    return _ptb(lines) if tokenizer == "ptb" else [_plain(line) for line in lines]


def _plain(line: str) -> str:
    text = _CLITIC.sub(r" \1", line.lower().replace("\u2019", "'"))
    return " ".join(word for word in _WORD.findall(text) if word[0].isalnum() or len(word) > 1)


def _ptb(lines: list[str]) -> list[str]:
    """One Java process for all `lines`; empty ones do not travel, for PTBTokenizer may swallow them."""
    filled = [line for line in lines if line]
    if not filled:
        return [""] * len(lines)
    program = java()
    if program is None:
        raise DataError("tokenizer ptb needs Java, and no java is on the PATH")
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = [
        *(program, "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"),
        *("-preserveLines", "-lowerCase", "-encoding", "UTF-8"),
    ]
    done = subprocess.run(
        command, input="\n".join(filled) + "\n", capture_output=True, encoding="utf-8", timeout=_BATCH_SECONDS
    )
    tokens = done.stdout.split("\n")[:-1]
    if done.returncode or len(tokens) != len(filled):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"PTBTokenizer gave {len(tokens)} lines for {len(filled)} captions (exit {done.returncode}: {last})"
        )
    kept = iter(" ".join(word for word in line.split() if word not in _PUNCTUATION) for line in tokens)
    return [next(kept) if line else "" for line in lines]
