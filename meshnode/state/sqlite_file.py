"""One SQLite file of the data folder: opened for its owner alone, brought up to date, its errors in one sentence.

Several processes may open a file at the same time (`meshnode invite` beside a running node): WAL, and a writer waits
for another one for at most two seconds.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from meshnode.core.errors import ConfigError, DiskError
from meshnode.core.reasons import cause

BUSY_S: Final = 2.0
_MEMORY: Final = ":memory:"


class SqliteFile:
    """One open file. Close it with `close` or use it in a `with` block. For one thread."""

    def __init__(self, path: Path | None, migrations: Sequence[str], *, what: str, lost: str) -> None:
        """Open or make the file, mode 0600, and bring it up to date.

        Args:
          path: None keeps everything in memory, for simulations.
          migrations: statements, numbered from 1, append only: a file written by any earlier version is brought up
            to date.
          what: the name of the file in sentences, such as "state file".
          lost: what is lost with a damaged one, the end of a sentence.

        Raises DiskError (can't be opened or is no database), ConfigError (written by a newer version).
        """
        self.path = path
        self._what, self._lost = what, lost
        try:
            if path is not None:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # SQLite's side files take the mode of this one
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(_MEMORY if path is None else path, timeout=BUSY_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            why = cause(error) if isinstance(error, OSError) else error
            raise DiskError(f"the {what} {path} can't be opened: {why}") from error
        try:
            with self._guard():
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA foreign_keys=ON")
                self._migrate(migrations)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def value(self, query: str) -> object:
        """The first column of the first row that a query gives; None when it gives none. Raises DiskError."""
        with self._guard():
            row = self._db.execute(query).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            remedy = _remedy(error, self._lost)
            raise DiskError(f"the {self._what} {self.path} can't be used: {error}. {remedy}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._guard():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    def _migrate(self, migrations: Sequence[str]) -> None:
        self._db.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY)")
        with self._transaction():
            (done,) = self._db.execute("SELECT coalesce(max(number), 0) FROM migrations").fetchone()
            if done > len(migrations):
                raise ConfigError(
                    f"{self.path} was written by a newer meshnode (format {done}, this one knows {len(migrations)}). "
                    "Update meshnode on this device."
                )
            for number in range(done + 1, len(migrations) + 1):
                for statement in migrations[number - 1].split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO migrations VALUES (?)", (number,))


def _remedy(error: sqlite3.Error, lost: str) -> str:
    """What to do, by SQLite's result code. `lost`: what is lost with a damaged file."""
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return f"It is damaged: stop the node, move it away and start again; {lost}."
        case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
            return "Free some disk space, and look whether the disk is sound."
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return "This user must be able to write it and its folder; `meshnode doctor` says what prevents that."
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "Another program holds it; try again."
        case _:
            return "Report this line."
