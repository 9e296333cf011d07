"""Reading annotation files with errors that name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mmq_kernels.eval.errors import DataError

_ID_KEYS = ("question_id", "id", "filename", "image", "image_id", "answer_id")

Pairs = Callable[[list[tuple[str, Any]]], Any]


def read_json(path: Path, pairs: Pairs | None = None) -> Any:
    """The content of a JSON file.

    Args:
        pairs: makes a value of the keys and values of each object, innermost first; None makes a dict.

    Raises:
        DataError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except FileNotFoundError:
        raise DataError(f"missing {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is no JSON file: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def entries(content: Any, key: str | None, path: Path) -> list[dict[str, Any]]:
    """The list of objects under `key` of a JSON object, or `content` itself where `key` is None.

    Raises:
        DataError: another layout, naming what was expected.
    """
    if key is not None:
        if not isinstance(content, dict):
            raise DataError(f'{path} has another layout: expected an object with "{key}", got a {_kind(content)}')
        if key not in content:
            raise DataError(f'{path} has another layout: missing key "{key}"')
        content = content[key]
    where = "a list" if key is None else f'"{key}" to be a list'
    if not isinstance(content, list):
        raise DataError(f"{path} has another layout: expected {where} of objects, got a {_kind(content)}")
    if not all(isinstance(entry, dict) for entry in content):
        raise DataError(f"{path} has another layout: expected {where} of objects")
    return content


def keyed_entries(path: Path, keep: frozenset[str], mark: str) -> dict[str, dict[str, Any]]:
    """The objects of a JSON file that is one object of them, by their keys.

    Args:
        keep: keys to keep of each object that has the key `mark`; the others go while the file is read.

    Raises:
        DataError: the file is missing, no JSON, of another layout, or holds a key twice.
    """

    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"{path}: id {twice} occurs twice")
        return {key: value for key, value in pairs if key in keep} if mark in found else found

    content = read_json(path, kept)
    if not isinstance(content, dict):
        raise DataError(f"{path} has another layout: expected an object of objects, got a {_kind(content)}")
    for key, value in content.items():
        if not isinstance(value, dict):
            raise DataError(f'{path} has another layout: expected an object under "{key}", got a {_kind(value)}')
    return content


def field(
    entry: dict[str, Any], key: str, kind: type | tuple[type, ...], path: Path, entry_id: int | str | None = None
) -> Any:
    """`entry[key]`, checked to be of `kind`; errors name the entry by `entry_id`, or by what ids it has itself.

    Raises:
        DataError: the key is missing or holds something else.
    """
    if key not in entry:
        raise DataError(f'{path} has another layout: an entry lacks key "{key}"{_called(entry, entry_id)}')
    if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
        raise DataError(f'{path} has another layout: "{key}" holds a {_kind(entry[key])}{_called(entry, entry_id)}')
    return entry[key]


def _called(entry: dict[str, Any], entry_id: int | str | None) -> str:
    """Of which entry something is said, where it has a name."""
    named = next((entry[key] for key in _ID_KEYS if isinstance(entry.get(key), (int, str))), entry_id)
    return "" if named is None else f" (of {named})"


def unique(items: Iterable[dict[str, Any]], key: str, path: Path) -> list[dict[str, Any]]:
    """`items`, after checking that no two have the same `key`.

    Raises:
        DataError: naming the key's value that occurs twice.
    """
    seen: set[Any] = set()
    checked = []
    for item in items:
        value = field(item, key, (int, str), path)
        if value in seen:
            raise DataError(f"{path}: {key} {value} occurs twice")
        seen.add(value)
        checked.append(item)
    return checked


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
