"""SPICE by pycocoevalcap's jar, where the parser's models are, which its package does not bring along.

Source: Anderson et al., "SPICE" (2016); the file format is that of the jar.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.spice import spice as packaged

from mmq_kernels.eval.errors import DataError
from mmq_kernels.eval.tokenization import java

FOLDER = Path(packaged.__file__).parent
_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_SECONDS = 6 * 3600.0


def spice_missing() -> str | None:
    """Why SPICE cannot be computed here, or None."""
    if java() is None:
        return "SPICE needs Java, and no java is on the PATH"
    if not (FOLDER / packaged.SPICE_JAR).is_file():
        return f"SPICE needs {FOLDER / packaged.SPICE_JAR}, which this pycocoevalcap lacks"
    missing = [name for name in _MODELS if not (FOLDER / "lib" / name).is_file()]
    if missing:
        return (
            f"SPICE needs {missing[0]} in {FOLDER / 'lib'}: "
            "python -m pycocoevalcap.spice.get_stanford_models downloads it (400 MB)"
        )
    return None


def spice_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """SPICE of the corpus and of each hypothesis, all tokenized text; 0 where a caption says nothing that parses.

    Raises:
        DataError: something is missing, or the scorer failed.
    """
    why_not = spice_missing()
    if why_not is not None:
        raise DataError(why_not)
    rows = [
        {"image_id": i, "test": hypothesis, "refs": list(texts)}
        for i, (hypothesis, texts) in enumerate(zip(hypotheses, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        asked.write_text(json.dumps(rows))
        command = [
            *(str(java()), "-Xmx8G", "-jar", packaged.SPICE_JAR, str(asked)),
            *("-out", str(answered), "-subset", "-silent"),
        ]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, encoding="utf-8", timeout=_SECONDS)
        if done.returncode or not answered.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"the SPICE scorer failed (exit {done.returncode}: {last})")
        found = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(answered.read_text())}
    scores = [_number(found.get(i)) for i in range(len(rows))]
    return sum(scores) / len(scores), scores


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and value == value else 0.0
