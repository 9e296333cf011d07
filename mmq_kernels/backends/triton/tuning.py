"""Which configuration a product gets: the table's, one found on this GPU before, or one that is found now.

Findings are kept in ``$MMQ_CACHE_DIR`` (default ``~/.cache/mmq_kernels``), one JSON file for each GPU, Triton and
package version. ``MMQ_TRITON_TUNE``: "auto" (default) tunes where the table does not know the GPU, "on" everywhere,
"off" never.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

from filelock import FileLock, Timeout

import mmq_kernels
from mmq_kernels.backends.triton.configs import Config, candidates, default_config, table_config

MODES = ("auto", "on", "off")
LOCK_SECONDS = 10
"""How long a process waits for another that writes; what it found stays in its memory otherwise."""

_log = logging.getLogger(__name__)


def mode() -> str:
    """What ``MMQ_TRITON_TUNE`` says.

    Raises:
        ValueError: for an unknown value.
    """
    value = os.environ.get("MMQ_TRITON_TUNE") or MODES[0]
    if value not in MODES:
        raise ValueError(f"MMQ_TRITON_TUNE must be one of {', '.join(MODES)}, got {value!r}")
    return value


def cache_file(gpu: str, triton_version: str) -> Path:
    """Where the findings of a GPU are kept."""
    version = mmq_kernels.__version__
    folder = os.environ.get("MMQ_CACHE_DIR") or Path.home() / ".cache" / "mmq_kernels"
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in (gpu, f"triton{triton_version}", f"mmq{version}"))
    return Path(folder) / f"{name}.json"


class Findings:
    """Configurations by key, in memory and in a file that several processes may share.

    A file that cannot be read or written is left out with one warning; the next finding replaces a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Config] | None = None
        self._warned = False

    def get(self, key: str) -> Config | None:
        """What was found for `key`, by this process or an earlier one."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, key: str, config: Config) -> None:
        """Keep a finding; the file appears whole or not at all, with what other processes found meanwhile."""
        self._known = {**(self._known or {}), key: config}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS):
                merged = {**self._read(), key: config}
                partial = self.path.with_suffix(f".{os.getpid()}.partial")
                lines = {name: list(astuple(found)) for name, found in sorted(merged.items())}
                partial.write_text(json.dumps(lines, indent=1) + "\n")
                os.replace(partial, self.path)
            self._known = {**merged, **self._known}
        except (OSError, Timeout) as error:
            self._warn("written", error)

    def _read(self) -> dict[str, Config]:
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            self._warn("read", error)
            return {}
        try:
            return {key: Config(*values) for key, values in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as error:
            self._warn("read", error)
            return {}

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            warnings.warn(f"configurations of Triton kernels cannot be {what} ({self.path}): {error}", stacklevel=4)
            self._warned = True


def choose(arch: str, m: int, key: str, findings: Findings, measure: Callable[[Config], float] | None) -> Config:
    """The configuration for `m` tokens.

    Args:
        arch: as `KNOWN` of configs.py names it.
        key: what else the choice depends on.
        measure: seconds of a call with a configuration, or None where nothing may be measured now (a graph is being
            captured). It raises RuntimeError for a configuration that this GPU cannot run.
    """
    wanted, listed = mode(), table_config(arch, m)
    if wanted == "off" or (wanted == "auto" and listed):
        return default_config(arch, m)
    found = findings.get(key)
    if found is None and measure is not None:
        found = fastest(candidates(arch, m), measure)
        if found is not None:
            findings.put(key, found)
    return found or default_config(arch, m)


def fastest(configs: list[Config], measure: Callable[[Config], float]) -> Config | None:
    """The configuration that takes the least time, of those that run at all."""
    best: tuple[float, Config] | None = None
    for config in configs:
        try:
            seconds = measure(config)
        except RuntimeError as error:
            _log.info("%s does not run here: %s", config, error)
            continue
        if best is None or seconds < best[0]:
            best = seconds, config
    return None if best is None else best[1]
