"""Per-sample predictions of configurations, as series that can be compared in pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmq_kernels.eval.bootstrap import MetricSamples
from mmq_kernels.eval.result import metric_samples

MOST_BYTES = 512 << 20
"""What is read of prediction files in one analysis."""


class Predictions:
    """Reads prediction files, each once, up to a bound.

    Args:
        path: where the predictions of a fingerprint are, if there are any (`Store.predictions`); None for nowhere.
        most_bytes: files are no longer read when so much was.

    Attributes:
        problems: files that could not be read, and why.
    """

    def __init__(self, path: Callable[[str], Path] | None = None, *, most_bytes: int = MOST_BYTES) -> None:
        self._path = path
        self._left = most_bytes
        self._known: dict[str, dict[str, MetricSamples]] = {}
        self.problems: list[str] = []

    def samples(self, fingerprint: str, metric: str) -> MetricSamples | None:
        """The metric sample by sample; None where that is not known."""
        if fingerprint not in self._known:
            self._known[fingerprint] = self._read(fingerprint)
        return self._known[fingerprint].get(metric)

    def there(self, fingerprint: str) -> bool:
        """Whether a configuration has a file of predictions."""
        return self._path is not None and self._path(fingerprint).is_file()

    def records(self, fingerprint: str) -> Iterator[dict[str, Any]]:
        """The records of a configuration, one a sample, as long as they can be read."""
        if self._path is None or not self.there(fingerprint):
            return
        path = self._path(fingerprint)
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise ValueError(f"{path}, line {number} is no JSON object: the file is damaged or truncated")
                yield record

    def _read(self, fingerprint: str) -> dict[str, MetricSamples]:
        if self._path is None or not self.there(fingerprint):
            return {}
        size = self._path(fingerprint).stat().st_size
        if size > self._left:
            self._note(f"predictions past {MOST_BYTES >> 20} MiB were not read: some differences are not tested")
            return {}
        self._left -= size
        try:
            found = metric_samples(self.records(fingerprint))
        except (ValueError, KeyError, TypeError, OSError) as error:
            missing = f"a record of {self._path(fingerprint)} lacks or misstates {error}"
            self._note(str(error) if isinstance(error, (ValueError, OSError)) else missing)
            return {}
        ratios = {name: series for name, series in found.items() if isinstance(series, MetricSamples)}
        return {name: series for name, series in ratios.items() if math.isfinite(series.value)}

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
