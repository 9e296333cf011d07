"""Reading annotation files with errors that name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmq_kernels.eval.errors import DataError


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"missing {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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


def field(entry: dict[str, Any], key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """`entry[key]`, checked to be of `kind`.

    Raises:
        DataError: the key is missing or holds something else.
    """
    if key not in entry:
        raise DataError(f'{path} has another layout: an entry lacks key "{key}"')
    if not isinstance(entry[key], kind):
        raise DataError(f'{path} has another layout: "{key}" holds a {_kind(entry[key])}')
    return entry[key]


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
