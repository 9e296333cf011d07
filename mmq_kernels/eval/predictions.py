"""Files of predictions that grow while a run goes on, survive its end, and say which run they belong to.

=========================  ================================================================================
FILE                       one JSON object a sample, in order; there when all are, whole or not at all
FILE.run.json              what made it, and a checksum of each of its lines
FILE.partial/run.json      what an unfinished run is made of
FILE.partial/kept.jsonl    what it had done when it was taken up for the last time
FILE.partial/rank-N.jsonl  what rank N has done since: a line a sample with its checksum, a chunk a write
=========================  ================================================================================

A process that is killed leaves whole chunks and at most one line that is not; that line is dropped and its chunk done
again. Any other line that is not as it was written is an error that names it.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from mmq_kernels.eval.errors import DataError

VERSION = 1
CHECK = "crc32"
Entry = dict[str, Any]
Record = dict[str, Any]
T = TypeVar("T")
_MENDS = "delete that line, and --resume does it again"


class PredictionsError(DataError):
    """A file of predictions is damaged, of another run, or in use."""


@dataclass(frozen=True)
class Run:
    """What predictions depend on, and how they are scored.

    Attributes:
        facts: what has to be equal for predictions to be of one run; values that JSON holds.
        scoring: task, seed, tokenizer and METEOR, with which they are scored.
    """

    facts: Mapping[str, Any]
    scoring: Mapping[str, Any]

    def require_same(self, facts: Mapping[str, Any], where: object) -> None:
        """
        Raises:
            PredictionsError: naming what differs from the `facts` of `where`.
        """
        mine = json.loads(json.dumps(dict(self.facts)))
        differing = [name for name in {**mine, **facts} if mine.get(name) != facts.get(name)]
        if differing:
            said = "; ".join(
                f"{name} is {_shown(facts.get(name))} there, {_shown(mine.get(name))} here" for name in differing
            )
            raise PredictionsError(f"{where} is of another run: {said}")


class Log:
    """Keeps nothing: for runs without a file of predictions.

    Attributes:
        kept: entries that an earlier run left.
        finished: all records, where an earlier run got that far.
        about: what that run said of itself.
    """

    kept: Sequence[Entry] = ()
    finished: list[Record] | None = None
    about: Mapping[str, Any] = {}

    def write(self, entries: Iterable[Entry]) -> None:
        """Keeps what was done; on the disk's way when this returns."""

    def finish(self, records: Sequence[Record], said: Mapping[str, Any]) -> None:
        """Makes the file of all `records`; `said` goes into what is said about it. Of rank 0 alone."""

    def close(self) -> None:
        """Lets go of files."""


class PredictionLog(Log):
    """The files of one run.

    Args:
        path: FILE.
        run: what is about to run.
        rank: of this process; rank 0 calls `begin` before any other writes.
    """

    def __init__(self, path: str | Path, run: Run, rank: int = 0) -> None:
        self.path, self._run, self._rank = Path(path), run, rank
        self.folder = self.path.with_name(f"{self.path.name}.partial")
        self._file: int | None = None
        self._lock: FileLock | None = None

    def begin(self, resume: bool, entries_of: Callable[[list[Record]], list[Entry]]) -> None:
        """Takes up what is there, of rank 0 alone.

        Args:
            resume: go on behind what is there; else an unfinished run is an error, and a finished one is replaced
                in the end.
            entries_of: entries that the records of an incomplete FILE stand for.

        Raises:
            PredictionsError: what is there is damaged elsewhere than at its end, of another run, or in use.
            OSError: the folder is missing, not writable or full.
        """
        if not self.path.parent.is_dir():
            raise PredictionsError(f"no folder {self.path.parent} for predictions")
        about = self.folder / "run.json"
        if about.is_file() and not resume:
            raise PredictionsError(f"{self.folder} holds an unfinished run; go on with --resume, or delete it")
        if about.is_file():
            self._hold()
            self._run.require_same(_about(about)["facts"], self.folder)
            self.kept = self._read_parts()
        elif resume and self.path.exists():
            found = read_predictions(self.path, self._run, lenient=True)
            if found.missing == 0:
                self.finished, self.about = found.records, found.about
                return
            self.kept = entries_of(found.records)
        self._start()

    def _hold(self) -> None:
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise PredictionsError(f"{self.folder} is in use by another process") from None

    def _start(self) -> None:
        """The folder, with all that is kept in one file, and then what it is of: before that, it counts for nothing."""
        self.folder.mkdir(exist_ok=True)
        if self._lock is None:
            self._hold()
        _write(self.folder / "kept.jsonl", _lines(self.kept))
        for part in self.folder.glob("rank-*.jsonl"):
            part.unlink()
        if not (self.folder / "run.json").exists():
            _write(self.folder / "run.json", json.dumps(self._said(), indent=1).encode())

    def _said(self) -> dict[str, Any]:
        return {"version": VERSION, "facts": dict(self._run.facts), "scoring": dict(self._run.scoring)}

    def _read_parts(self) -> list[Entry]:
        found: dict[str, Entry] = {}
        for part in sorted(self.folder.glob("*.jsonl")):
            for entry in _checked(part, _unpacked):
                found[json.dumps([entry.get(name) for name in ("kind", "sample")])] = entry
        return list(found.values())

    def write(self, entries: Iterable[Entry]) -> None:
        if self._file is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._file = os.open(self.folder / f"rank-{self._rank}.jsonl", flags, 0o666)
        left = memoryview(_lines(entries))
        while left:
            left = left[os.write(self._file, left) :]

    def finish(self, records: Sequence[Record], said: Mapping[str, Any]) -> None:
        lines = [record_line(record) for record in records]
        checks = b"".join(zlib.crc32(line).to_bytes(4, "little") for line in lines)
        about = {**self._said(), **said, CHECK: base64.b64encode(checks).decode()}
        whole, told = self.folder / "whole.tmp", self.folder / "about.tmp"
        whole.write_bytes(b"".join(line + b"\n" for line in lines))
        told.write_bytes(json.dumps(about, indent=1).encode())
        _sidecar(self.path).unlink(missing_ok=True)  # what it says would be of another file for a moment
        os.replace(whole, self.path)
        os.replace(told, _sidecar(self.path))
        (self.folder / "run.json").unlink()  # first: without it the rest counts for nothing
        self.close()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Lets go of the files."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


@dataclass(frozen=True)
class Predictions:
    """What a file of predictions holds.

    Attributes:
        records: one a sample.
        about: what FILE.run.json says; empty where there is none.
        missing: how many records its run wrote that are not there; None where nothing says so.
    """

    records: list[Record]
    about: Mapping[str, Any]
    missing: int | None


def read_predictions(path: str | Path, run: Run | None = None, *, lenient: bool = False) -> Predictions:
    """The records of FILE, each as it was written.

    Args:
        run: that it has to be of.
        lenient: whether its end may be missing or damaged, where FILE.run.json tells what was there.

    Raises:
        PredictionsError: no such file; a damaged line, named; an end that is missing; another run.
    """
    path = Path(path)
    if not path.is_file():
        raise PredictionsError(f"no predictions {path}")
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        if run is not None:
            raise PredictionsError(
                f"{path} may be of another run: there is no {sidecar.name} to say; delete it to begin anew"
            )
        return Predictions(_checked(path, _record, lenient=False), {}, None)
    about = _about(sidecar)
    if run is not None:
        run.require_same(about["facts"], path)
    written = base64.b64decode(about[CHECK])
    places: dict[bytes, list[int]] = {}
    for place in reversed(range(len(written) // 4)):
        places.setdefault(written[4 * place : 4 * place + 4], []).append(place)

    def as_written(line: bytes) -> tuple[int, Record]:
        left = places.get(zlib.crc32(line).to_bytes(4, "little"))
        if left is None:
            raise ValueError("it is not as it was written")
        if not left:
            raise ValueError("it is there twice")
        return left.pop(), _record(line)

    found = [record for _, record in sorted(_checked(path, as_written, lenient=lenient), key=lambda pair: pair[0])]
    missing = len(written) // 4 - len(found)
    if missing and not lenient:
        raise PredictionsError(
            f"{path} holds {len(found)} of the {len(written) // 4} records that its run wrote; --resume completes it"
        )
    return Predictions(found, about, missing)


def record_line(record: Record) -> bytes:
    """One line of FILE, without its end."""
    return json.dumps(finite(record), ensure_ascii=False).encode()


def finite(value: Any) -> Any:
    """`value` with None in the place of what is no finite number."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checked(path: Path, read: Callable[[bytes], T], *, lenient: bool = True) -> list[T]:
    """What `read` makes of each line.

    Args:
        lenient: whether a last line that is damaged is dropped.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PredictionsError(f"cannot read {path}: {error.strerror or error}") from None
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    found: list[T] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(read(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                if lenient:
                    break
                raise PredictionsError(f"{path}, line {number}, its last, is cut off or damaged ({error})") from None
            raise PredictionsError(f"{path}, line {number} is damaged ({error}); {_MENDS}") from None
    return found


def _record(line: bytes) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict) or "id" not in record or "image" not in record:
        raise ValueError("it is no record of a prediction")
    return record


def _lines(entries: Iterable[Entry]) -> bytes:
    return b"".join(_packed(entry) for entry in entries)


def _packed(entry: Entry) -> bytes:
    entry = finite(entry)
    return json.dumps({**entry, CHECK: zlib.crc32(json.dumps(entry).encode())}).encode() + b"\n"


def _unpacked(line: bytes) -> Entry:
    entry = json.loads(line)
    if not isinstance(entry, dict) or entry.pop(CHECK, None) != zlib.crc32(json.dumps(entry).encode()):
        raise ValueError("it is not as it was written")
    return entry


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes())
        version = about["version"]
        assert isinstance(about["facts"], dict) and isinstance(about["scoring"], dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise PredictionsError(f"{path} is damaged: it does not say which run its predictions are of") from None
    if version != VERSION:
        raise PredictionsError(f"{path} is of version {version}; this package reads {VERSION}")
    return about


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write(path: Path, content: bytes) -> None:
    beside = _beside(path)
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _shown(value: Any) -> str:
    return "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
