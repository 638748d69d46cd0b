"""How much room there is, and what is evicted when it is not enough."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from meshnode.core.errors import DiskError
from meshnode.core.sizes import format_size
from meshnode.store.index import Index
from meshnode.store.os_files import disk_errors, is_locked
from meshnode.store.port import SPARE_PIN, StoreUsage

RESERVE_BYTES: Final = 64 << 20  # left free on the disk for the index, logs and everybody else
_UNPINNED_BYTES: Final = (
    "SELECT (SELECT coalesce(sum(size), 0) FROM files WHERE complete = 1 AND cid NOT IN (SELECT cid FROM pins)) + "
    "(SELECT coalesce(sum(length(data)), 0) FROM blocks WHERE cid NOT IN (SELECT cid FROM pins))"
)

_EVICTABLE: Final = (
    "SELECT cid, size, complete FROM (SELECT cid, size, complete, used_ms FROM files UNION ALL "
    "SELECT cid, length(data), 2, used_ms FROM blocks) AS held "
    "WHERE NOT EXISTS (SELECT 1 FROM pins WHERE pins.cid = held.cid AND pins.name <> ?) "
    "ORDER BY EXISTS (SELECT 1 FROM pins WHERE pins.cid = held.cid), used_ms, cid"
)


class Places(Protocol):
    """Where the store has its files."""

    def file(self, name: bytes) -> Path:
        """Of a binary CID, complete."""

    def part(self, name: bytes) -> Path:
        """The same while it is fetched."""


class Room:
    """The quota of one content folder, and the disk under it."""

    def __init__(self, folder: Path, quota_bytes: int, index: Index, places: Places) -> None:
        self._folder = folder
        self.quota_bytes = quota_bytes
        self._index = index
        self._places = places

    def usage(self) -> StoreUsage:
        """Bytes held (files being fetched count whole), the quota, and what is free on the disk."""
        with disk_errors(self._folder, "look at the free space of"):
            free = shutil.disk_usage(self._folder).free
        used = self.used_bytes()
        (unpinned,) = self._index.row(_UNPINNED_BYTES) or (0,)
        return StoreUsage(
            used_bytes=used,
            quota_bytes=self.quota_bytes,
            free_disk_bytes=free,
            room_bytes=max(0, min(self.quota_bytes - used, free - RESERVE_BYTES) + int(unpinned)),
        )

    def used_bytes(self, db: sqlite3.Connection | None = None) -> int:
        """Of everything held; files being fetched count whole."""
        query = (
            "SELECT (SELECT coalesce(sum(size), 0) FROM files) + (SELECT coalesce(sum(length(data)), 0) FROM blocks)"
        )
        row = self._index.row(query) if db is None else db.execute(query).fetchone()
        return int(row[0]) if row else 0

    def make(self, db: sqlite3.Connection, size: int, what: str) -> None:
        """Evict what was not used for longest until `size` more bytes fit the quota and the disk.

        What is unpinned goes first, then spare copies (SPARE_PIN).
        Raises DiskError when everything that is left is pinned; nothing was evicted then.
        """
        evictable = self.evictable(db, spare=True)
        used, free = self.used_bytes(db), self._free()
        kept = used - sum(held for _, held in evictable)
        if kept + size > self.quota_bytes:
            raise DiskError(
                f"no room for {what}: {self._folder} holds {format_size(kept)} of its quota of "
                f"{format_size(self.quota_bytes)}, all of it pinned, in use or the last copy in the mesh; raise "
                "content.quota, or remove a model with `meshnode model remove`"
            )
        if free < size + RESERVE_BYTES and free + sum(self._on_disk(n) for n, _ in evictable) < size + RESERVE_BYTES:
            raise self._disk_full(what, size)
        for name, held in evictable:
            if used + size <= self.quota_bytes and free >= size + RESERVE_BYTES:
                return
            self.evict(db, name)
            used, free = used - held, self._free()
        if free < size + RESERVE_BYTES:
            raise self._disk_full(what, size)

    def _disk_full(self, what: str, size: int) -> DiskError:
        return DiskError(
            f"no room for {what}: the disk of {self._folder} has {format_size(self._free())} left, "
            f"{format_size(size + RESERVE_BYTES)} are needed; free some space"
        )

    def _free(self) -> int:
        with disk_errors(self._folder, "look at the free space of"):
            return shutil.disk_usage(self._folder).free

    def evictable(self, db: sqlite3.Connection, *, spare: bool = False) -> list[tuple[bytes, int]]:
        """(CID, size) of unpinned things that nobody is fetching, least recently used first.

        `spare`: behind them those that no other pin than SPARE_PIN protects.
        """
        rows = db.execute(_EVICTABLE, (SPARE_PIN if spare else "",)).fetchall()
        return [(name, size) for name, size, complete in rows if complete or not is_locked(self._places.part(name))]

    def evict(self, db: sqlite3.Connection, name: bytes) -> None:
        """Delete a file, a partial file or a block, and its pins."""
        db.execute("DELETE FROM pins WHERE cid = ?", (name,))
        db.execute("DELETE FROM blocks WHERE cid = ?", (name,))
        db.execute("DELETE FROM files WHERE cid = ?", (name,))
        with disk_errors(self._places.file(name), "delete"):
            self._places.file(name).unlink(missing_ok=True)
            self._places.part(name).unlink(missing_ok=True)

    def _on_disk(self, name: bytes) -> int:
        """Bytes that come free when a file is deleted; none while another name leads to it."""
        found = 0
        for path in (self._places.file(name), self._places.part(name)):
            with suppress(OSError):
                status = path.stat()
                found += status.st_blocks * 512 if status.st_nlink == 1 else 0
        return found
