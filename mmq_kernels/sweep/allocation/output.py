"""The folder of an allocation: ``recipe.yaml``, ``allocation.json``, and what was measured on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from mmq_kernels.quantize import Recipe
from mmq_kernels.sweep.store import fingerprint

REPORT, RECIPE, MEASUREMENTS = "allocation.json", "recipe.yaml", "measurements.jsonl"


class Output:
    """Where an allocation goes.

    Args:
        folder: made where it is not there.
        request: everything that the result depends on.

    Raises:
        ValueError: for a folder with the allocation of another request, or one that cannot be.
    """

    def __init__(self, folder: str | Path, request: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._request = fingerprint(**request)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file; give the name of a folder")
        report = self.folder / REPORT
        if report.is_file():
            try:
                before = json.loads(report.read_text(encoding="utf-8"))
                request_before, budget = before["request"], before["budget"]["asked"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{report} is no allocation; give another folder") from None
            if request_before != self._request:
                raise ValueError(
                    f"{folder} holds another allocation (budget {budget}); give another folder, and --measurements "
                    f"{self.measurements} for not measuring again what was measured for it"
                )
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def measurements(self) -> Path:
        """The file of measurements."""
        return self.folder / MEASUREMENTS

    @property
    def recipe(self) -> Path:
        """The file that ``mmq quantize --recipe`` reads."""
        return self.folder / RECIPE

    def write(self, report: dict[str, Any], recipe: Recipe) -> None:
        """Each file beside first, and then in its place."""
        rules = [rule.model_dump(exclude_defaults=True) for rule in recipe.rules]
        text = f"# {recipe}\n" + yaml.safe_dump({"rules": rules}, sort_keys=False)
        for path, content in (
            (self.recipe, text),
            (self.folder / REPORT, json.dumps({"request": self._request, **report}, indent=1) + "\n"),
        ):
            beside = path.with_name(f".{path.name}.tmp")
            beside.write_text(content, encoding="utf-8")
            os.replace(beside, path)
