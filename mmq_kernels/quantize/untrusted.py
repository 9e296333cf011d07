"""Configuration files and regular expressions of people one does not know: read, or refused, in bounded time."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

import yaml

MOST_BYTES = 1_000_000
"""Of a configuration file."""

MOST_REPEATS = 4
"""Repeats without bound in an expression; matching a name takes time to that power of its length."""

_REPEATS = {getattr(_constants, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")}


class _Loader(yaml.SafeLoader):
    """Without aliases, with which a few lines stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError(f"aliases are not read ({self.peek_event().start_mark})")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """The content of a YAML or JSON file (which is YAML, and may have trailing commas then).

    Raises:
        ValueError: one line that says what is wrong with the file, without its name.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it must have at most {MOST_BYTES} bytes, got {path.stat().st_size}")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(shortened(str(error))) from None


@lru_cache(maxsize=4096)
def expression(text: str) -> re.Pattern[str]:
    """A compiled regular expression that matches names in bounded time.

    Raises:
        ValueError: for one that is none, that repeats repeats or alternatives, or that has too many repeats.
    """
    try:
        parsed, compiled = _parser.parse(text), re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shortened(repr(text))} is no regular expression: {shortened(str(error))}") from None
    if _repeats(parsed, False) > MOST_REPEATS:
        raise ValueError(
            f"{shortened(repr(text))} must have at most {MOST_REPEATS} repeats (* and +), and none of repeats or of "
            "alternatives: matching could take for ever"
        )
    return compiled


def _repeats(parsed: Any, repeated: bool) -> int:
    """Repeats without bound in a parsed expression; far too many where they are nested."""
    count = 0
    for item in parsed:
        op, argument = item
        if op in _REPEATS:
            many = argument[1] > MOST_REPEATS
            count += (1 + (MOST_REPEATS if repeated else 0)) * many
            count += _repeats(argument[2], repeated or many)
        elif op is _constants.BRANCH:
            count += MOST_REPEATS + 1 if repeated else sum(_repeats(part, False) for part in argument[1])
        elif op is _constants.SUBPATTERN:
            count += _repeats(argument[3], repeated)
        elif op in (_constants.ASSERT, _constants.ASSERT_NOT):
            count += _repeats(argument[1], repeated)
        elif op is _constants.ATOMIC_GROUP:
            count += _repeats(argument, repeated)
        elif op is _constants.GROUPREF_EXISTS:
            count += sum(_repeats(part, repeated) for part in argument[1:] if part)
    return count


def shortened(text: str, most: int = 200) -> str:
    """One line of it, for a message."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."
