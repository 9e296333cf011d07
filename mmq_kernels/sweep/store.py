"""The results of configurations in one SQLite file, a row each, keyed by what was run.

Write-ahead logging, one transaction a row: several processes write at once, and a process that is killed leaves its
finished rows and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

APPLICATION = 0x6D6D7152
"""SQLite's `application_id` of such a file: "mmqR"."""

VERSION = 3
PATIENCE_SECONDS = 60

LEASE_SECONDS = 600
"""After which a claim that was not renewed is nobody's."""

SCHEMA = """
create table texts (id integer primary key, text text not null unique);
create table claims (fingerprint text primary key, owner text not null, until real not null) without rowid;
create table results (
    fingerprint text primary key,
    model integer not null references texts,
    task text not null,
    method text not null,
    factors text not null,
    metrics text not null,
    intervals text not null,
    samples integer,
    data integer not null references texts,
    recipe text not null,
    bpw real,
    bytes integer,
    latency real,
    seconds real,
    seed integer,
    versions integer not null references texts,
    settings integer not null references texts
);
"""
"""What many rows have in common stands once, in `texts`; a row of a few hundred bytes is appended, not put in order."""


class StoreError(ValueError):
    """A file that is no results database, or of another version."""


def fingerprint(**facts: Any) -> str:
    """Equal for equal facts, which are anything that JSON holds; 32 hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Result:
    """What came of one configuration.

    Attributes:
        fingerprint: of the configuration; see `fingerprint`.
        model, task, method: what was quantized, what it was scored on, and how it was quantized.
        factors: what was varied: bits of a component, or a name such as a kind of layer.
        metrics: scores by name, as `mmq_kernels.eval` names them; fractions, not percents.
        intervals: ends of their 95% intervals, of those that have one.
        samples: how many were scored.
        data: folder of what was scored on; empty where it is not known.
        recipe: in the one-line form; empty where there is none.
        bpw: bits a weight, of all parameters.
        bytes: of the model.
        latency: seconds a sample.
        seconds: wall time of the run.
        seed: of what was drawn at random.
        versions: of the packages it was run with, and the device.
        settings: of quantization, calibration and evaluation, as far as all configurations of a sweep share them.
    """

    fingerprint: str
    model: str
    task: str
    method: str
    factors: Mapping[str, float | str]
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    samples: int | None = None
    data: str = ""
    recipe: str = ""
    bpw: float | None = None
    bytes: int | None = None
    latency: float | None = None
    seconds: float | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


COLUMNS = tuple(each.name for each in fields(Result))
OBJECTS = ("factors", "metrics", "intervals", "versions", "settings")
SHARED = ("model", "data", "versions", "settings")
"""Columns that hold the number of a text."""
FILTERS = ("model", "task", "method")


class Store:
    """A database of `Result`s.

    Args:
        path: made where it is not there, unless `existing`.
        existing: whether it has to be there.

    Raises:
        StoreError: for a file that is no such database, or of another version; it is left as it is.
    """

    def __init__(self, path: str | Path, *, existing: bool = False) -> None:
        self.path = Path(path)
        if existing and not self.path.is_file():
            raise StoreError(f"no results database {self.path}")
        if not self.path.parent.is_dir():
            raise StoreError(f"no folder {self.path.parent} for a results database")
        self._connection = sqlite3.connect(self.path, timeout=PATIENCE_SECONDS, isolation_level=None)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StoreError(f"{self.path} is no results database: {error}") from None
        except StoreError:
            self._connection.close()
            raise

    def _open(self) -> None:
        if not self._made():
            with self._transaction():
                if not self._made():  # by another process meanwhile
                    if self._ask("select count(*) from sqlite_master"):
                        raise StoreError(f"{self.path} is a database, but none of results")
                    for statement in filter(str.strip, SCHEMA.split(";")):
                        self._connection.execute(statement)
                    self._connection.execute(f"pragma application_id = {APPLICATION}")
                    self._connection.execute(f"pragma user_version = {VERSION}")
        version = self._ask("pragma user_version")
        if version != VERSION:
            raise StoreError(f"{self.path} is a results database of version {version}; this package has {VERSION}")
        self._connection.execute("pragma journal_mode = wal")

    def _made(self) -> bool:
        return self._ask("pragma application_id") == APPLICATION

    def _ask(self, question: str) -> int:
        return self._connection.execute(question).fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._connection.execute("rollback")
            raise
        self._connection.execute("commit")

    def add(self, results: Iterable[Result]) -> int:
        """Keep results in one transaction; those that are there already stay as they are. Gives how many are new."""
        rows = [_row(result) for result in results]
        marks = ", ".join("(select id from texts where text = ?)" if name in SHARED else "?" for name in COLUMNS)
        places = [COLUMNS.index(name) for name in SHARED]
        texts = {(row[place],) for row in rows for place in places}
        with self._transaction():
            self._connection.executemany("insert into texts (text) values (?) on conflict do nothing", texts)
            before = self._connection.total_changes
            self._connection.executemany(
                f"insert into results ({', '.join(COLUMNS)}) values ({marks}) on conflict do nothing", rows
            )
            return self._connection.total_changes - before

    def remove(self, fingerprint: str) -> None:
        """Forget a result, so that a sweep makes it again; its predictions are deleted."""
        self._connection.execute("delete from results where fingerprint = ?", (fingerprint,))
        self.predictions(fingerprint).unlink(missing_ok=True)

    def claim(self, fingerprints: Sequence[str], owner: str, seconds: float = LEASE_SECONDS) -> bool:
        """Say that these are being worked on, unless somebody else has said so of one of them less than a lease ago.

        A claim is advice, so that two sweeps on one database do not do the same at the same time. Nothing waits for
        one: rows are never doubled, whoever brings them.
        """
        now = time.time()
        marks = ", ".join("?" * len(fingerprints))
        with self._transaction():
            taken = self._connection.execute(
                f"select 1 from claims where owner <> ? and until > ? and fingerprint in ({marks}) limit 1",
                (owner, now, *fingerprints),
            ).fetchone()
            if taken is None:
                rows = [(each, owner, now + seconds) for each in fingerprints]
                self._connection.executemany("insert or replace into claims values (?, ?, ?)", rows)
        return taken is None

    def renew(self, owner: str, seconds: float = LEASE_SECONDS) -> None:
        """Somebody is still at work."""
        self._connection.execute("update claims set until = ? where owner = ?", (time.time() + seconds, owner))

    def release(self, owner: str) -> None:
        """Somebody is not at work any more."""
        self._connection.execute("delete from claims where owner = ?", (owner,))

    def missing(self, fingerprints: Iterable[str]) -> set[str]:
        """Those of which there is no row."""
        return {each for each in fingerprints if each not in self}

    def predictions(self, fingerprint: str) -> Path:
        """Where predictions of a configuration are, JSON lines a sample, if they were kept: beside the database."""
        return self.path.with_name(self.path.name + ".predictions") / f"{fingerprint}.jsonl"

    def __contains__(self, fingerprint: str) -> bool:
        found = self._connection.execute("select 1 from results where fingerprint = ?", (fingerprint,))
        return found.fetchone() is not None

    def __len__(self) -> int:
        return self._ask("select count(*) from results")

    def results(self, **wanted: str | None) -> list[Result]:
        """Results of a model, task or method (None: of any), in the order of their fingerprints."""
        unknown = set(wanted) - set(FILTERS)
        assert not unknown, unknown
        chosen = {name: value for name, value in wanted.items() if value is not None}
        where = " and ".join(
            f"{name} = (select id from texts where text = ?)" if name in SHARED else f"{name} = ?" for name in chosen
        )
        question = f"select {', '.join(COLUMNS)} from results where {where or '1'} order by fingerprint"
        texts = _Texts(self._connection)
        with closing(self._connection.execute(question, tuple(chosen.values()))) as rows:
            return [_result(row, texts) for row in rows]

    def values(self, column: str) -> list[str]:
        """The models, tasks or methods that there are."""
        assert column in FILTERS, column
        question = f"select distinct {column} from results"
        if column in SHARED:
            question = f"select text from texts where id in ({question})"
        return sorted(row[0] for row in self._connection.execute(question))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _row(result: Result) -> tuple[Any, ...]:
    row = {name: getattr(result, name) for name in COLUMNS}
    for name in OBJECTS:
        try:
            row[name] = json.dumps(dict(row[name]), sort_keys=True, separators=(",", ":"), allow_nan=False)
        except ValueError:
            raise ValueError(f"{name} of {result.fingerprint} must be finite, got {dict(row[name])}") from None
    return tuple(row[name] for name in COLUMNS)


_decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: {sys.intern(name): value for name, value in pairs})
"""Many rows have the same few names, which are kept once."""


class _Texts:
    """Texts by number, and what those that are objects stand for; each is read once."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._known: dict[tuple[int, bool], Any] = {}

    def __call__(self, number: int, is_object: bool) -> Any:
        key = number, is_object
        if key not in self._known:
            (text,) = self._connection.execute("select text from texts where id = ?", (number,)).fetchone()
            self._known[key] = json.loads(text) if is_object else text
        return self._known[key]


def _result(row: tuple[Any, ...], texts: _Texts) -> Result:
    found = dict(zip(COLUMNS, row, strict=True))
    found |= {name: texts(found[name], name in OBJECTS) for name in SHARED}
    found |= {name: _decoder.decode(found[name]) for name in OBJECTS if name not in SHARED}
    found["intervals"] = {name: tuple(ends) for name, ends in found["intervals"].items()}
    return Result(**found)
