"""The SQLite index of a content folder, shared by threads of one process and by several processes.

Two connections: one for writing, behind a lock, and one for reading, so that a look-up on the event loop
never waits for somebody's fsync. Every SQLite error becomes a DiskError sentence.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from meshnode.core.errors import DiskError
from meshnode.store.schema import MIGRATIONS

BUSY_S: Final = 20  # another process may be in the middle of a batch


class Index:
    """Tables of `schema.py` in `<folder>/index.sqlite`."""

    def __init__(self, path: Path) -> None:
        """Raises DiskError: no permission, damaged, or written by a newer meshnode."""
        self._path = path
        self._lock = threading.RLock()
        self._read_lock = threading.Lock()
        with self._errors():
            self._writer = self._connect()
            self._migrate()
            self._reader = self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _migrate(self) -> None:
        connection = self._writer
        connection.execute("BEGIN IMMEDIATE")
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise DiskError(
                    f"{self._path} was written by a newer meshnode (schema {version}, this one knows "
                    f"{len(MIGRATIONS)}); update meshnode, or use another data folder"
                )
            for script in MIGRATIONS[version:]:
                for statement in script.split(";"):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # our bug (a closed connection, a wrong statement), not the disk's
        except sqlite3.OperationalError as error:
            raise DiskError(
                f"the content index {self._path} can't be used: {error}; check free space and permissions"
            ) from error
        except sqlite3.DatabaseError as error:
            raise DiskError(
                f"the content index {self._path} is damaged ({error}); delete it and start again: "
                "the files beside it are read in anew"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The write connection inside BEGIN IMMEDIATE; rolled back if the body raises. Nests into the outer one."""
        with self._lock, self._errors():
            if self._writer.in_transaction:
                yield self._writer
                return
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a SELECT, as last committed."""
        with self._read_lock, self._errors():
            return self._reader.execute(query, values).fetchall()

    def row(self, query: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row of a SELECT, or None."""
        found = self.rows(query, values)
        return found[0] if found else None

    def version(self) -> int:
        """Another number after every change that was committed, by us or by another process."""
        (number,) = self.row("PRAGMA data_version") or (0,)  # what other connections than the reader have done
        return int(number)

    def close(self) -> None:
        with self._lock, self._read_lock:
            self._writer.close()
            self._reader.close()
