"""What was measured, in a file that outlives a killed run: a JSON object a line, keyed by what it depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmq_kernels.sweep.store import fingerprint


class Measurements:
    """Measurements by key, appended to a file as they are made.

    Args:
        path: of the file; made where it is not there. What a killed process left of its last line is dropped.
        about: what all of them depend on: model, data, method, versions. Others in the file are left alone.

    Raises:
        ValueError: for a file that holds something else, naming its line.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.fresh = 0
        """How many were made by this object."""
        self._known: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole, _, rest = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._known[row["key"]] = row["value"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"every line of {self.path} must be a measurement, got {line[:40]!r} in line {number}"
                ) from None
        if rest:
            with self.path.open("r+b") as file:
                file.truncate(len(content) - len(rest))

    def key(self, **what: Any) -> str:
        """Of one measurement."""
        return fingerprint(about=self.about, **what)

    def get(self, **what: Any) -> Any:
        """A measurement, or None."""
        return self._known.get(self.key(**what))

    def put(self, value: Any, **what: Any) -> Any:
        """Keep a measurement: on disk when this returns."""
        line = json.dumps({"key": self.key(**what), "what": what, "value": value}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[self.key(**what)] = value
        self.fresh += 1
        return value

    def once(self, make: Callable[[], Any], **what: Any) -> Any:
        """A measurement, made now where there is none."""
        found = self.get(**what)
        return self.put(make(), **what) if found is None else found
