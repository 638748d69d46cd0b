"""A file that is being fetched: `<cid>.part` beside its rows in the index.

What a row says is a claim; what counts after a restart is what hashes to the right CID, so neither a power
cut nor a truncated `.part` can bring a wrong byte into the finished file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshnode.core.errors import ModelError
from meshnode.store.index import Index
from meshnode.store.os_files import disk_errors, sync_folder, write_all
from protocols.errors import RemoteProtocolError
from protocols.ids import RAW, Cid
from protocols.unixfs.assembly import Assembly
from protocols.unixfs.leaf import wrap

READ_ONLY: Final = 0o444

Buffer = bytes | bytearray | memoryview


def leaf_block(cid: bytes, data: bytes) -> bytes:
    """The block of a leaf with this binary CID around its bytes in the file: they themselves, or a dag-pb node."""
    return data if cid[1] == RAW else wrap(data)


@dataclass(frozen=True, slots=True)
class Row:
    """Of a file in the index."""

    index: Index
    number: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file lies: while it is fetched, open and locked, and when it is whole."""

    part: Path
    final: Path
    descriptor: int


class PartialFile:
    """Implements the port `Partial`. Owns the locked descriptor of its `.part`."""

    def __init__(
        self,
        cid: Cid,
        size: int,
        *,
        row: Row,
        place: Place,
        held: Callable[[bytes], bytes | None],
        cover: Callable[[Buffer, int], Buffer],
    ) -> None:
        """Take up what an earlier fetch left, after hashing it.

        Args:
          row: of this file; `place`: whose descriptor is ours from now on.
          held: bytes of a block that the store has anyhow, by binary CID; saves fetching it.
          cover: (piece, offset) -> as it stands on the disk, and back.
        Raises:
          RemoteProtocolError: no file of this size can have this CID.
          DiskError: the `.part` can't be written.
        """
        self.cid = cid
        self.size = size
        self._index, self._number = row.index, row.number
        self._part, self._final = place.part, place.final
        self._held = held
        self._cover = cover
        self._assembly = Assembly(cid, size)
        self._descriptor: int | None = place.descriptor
        with disk_errors(place.part, "write"):
            os.ftruncate(place.descriptor, size)
        self._resume(place.descriptor)

    @property
    def done_bytes(self) -> int:
        return self._assembly.done_bytes

    @property
    def complete(self) -> bool:
        return self._assembly.complete

    def wanted(self) -> dict[bytes, int]:
        """Missing blocks that are known by name: binary CID -> bytes (an upper bound for the root)."""
        return self._assembly.wanted()

    def write(self, blocks: Sequence[tuple[bytes, Buffer]]) -> dict[bytes, int]:
        """Keep blocks whose hash the caller has checked; returns what is wanted from now on besides.

        Raises ModelError when the tree under this CID is not a file of this size, DiskError.
        """
        descriptor = self._open_descriptor()
        fresh: dict[bytes, int] = {}
        leaves: list[tuple[bytes, int]] = []
        nodes: list[tuple[bytes, bytes]] = []
        pending = list(blocks)
        while pending:
            cid, data = pending.pop()
            if not self._assembly.wants(cid):
                continue
            fresh.pop(cid, None)
            try:
                if self._assembly.is_leaf(cid):
                    leaves += self._put_leaf(descriptor, cid, data)
                else:
                    new = self._assembly.add_node(cid, data)
                    nodes.append((cid, bytes(data)))
                    pending += self._held_already(new)
                    fresh.update(new)
            except RemoteProtocolError as error:
                raise ModelError(
                    f"{self.cid} can't be fetched: {error}. Whoever published it gave a wrong size or a layout that "
                    "is not supported; publish it again"
                ) from error
        self._record(leaves, nodes)
        return {cid: size for cid, size in fresh.items() if self._assembly.wants(cid)}

    def finish(self) -> Path:
        """Make it a file of the store (fsync, atomic rename) and close. Only when `complete`."""
        descriptor = self._open_descriptor()
        if not self.complete:
            raise RuntimeError(f"{self.cid} is not complete")
        with disk_errors(self._part, "write"):
            os.fchmod(descriptor, READ_ONLY)
            os.fsync(descriptor)
            with self._index.transaction() as db:
                db.execute(
                    "UPDATE files SET complete = 1, mtime_ns = ? WHERE id = ?",
                    (os.fstat(descriptor).st_mtime_ns, self._number),
                )
                self._part.replace(self._final)
                sync_folder(self._final.parent)
        self.close()
        return self._final

    def close(self) -> None:
        """Stop here; what was written is found again by the next fetch of the same CID."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise RuntimeError(f"the fetch of {self.cid} was closed")
        return self._descriptor

    def _put_leaf(self, descriptor: int, cid: bytes, data: Buffer) -> list[tuple[bytes, int]]:
        places = self._assembly.unfilled(cid)
        content = self._assembly.content(cid, data)
        if len(data) == self._assembly.size_of(cid):  # else add_leaf refuses it, before a byte is written
            with disk_errors(self._part, "write"):
                for _, offset in places:
                    write_all(descriptor, self._cover(content, offset), offset)
        self._assembly.add_leaf(cid, len(data))
        return [(cid, position) for position, _ in places]

    def _held_already(self, cids: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
        """Those blocks that the store has from another file, and whose bytes are still right."""
        found = []
        for cid in cids:
            data = self._held(cid)
            if data is not None and hashlib.sha256(data).digest() == cid[4:]:
                found.append((cid, data))
        return found

    def _record(self, leaves: list[tuple[bytes, int]], nodes: list[tuple[bytes, bytes]]) -> None:
        if not leaves and not nodes:
            return
        with self._index.transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO leaves VALUES (?, ?, ?)", ((cid, self._number, at) for cid, at in leaves)
            )
            db.executemany(
                "INSERT OR IGNORE INTO nodes VALUES (?, ?, ?)", ((self._number, cid, data) for cid, data in nodes)
            )
            layout = self._assembly.layout
            if nodes and layout is not None:
                db.execute("UPDATE files SET chunk = ? WHERE id = ?", (layout.chunk, self._number))

    def _resume(self, descriptor: int) -> None:
        """Hash everything the index claims; forget the claims that do not hold."""
        nodes = dict(self._index.rows("SELECT cid, data FROM nodes WHERE file = ?", (self._number,)))
        while found := [(cid, nodes.pop(cid)) for cid in self._assembly.wanted() if cid in nodes]:
            for cid, data in found:
                if hashlib.sha256(data).digest() == cid[4:]:
                    self._assembly.add_node(cid, data)
        claims: dict[bytes, set[int]] = {}
        for cid, position in self._index.rows("SELECT cid, position FROM leaves WHERE file = ?", (self._number,)):
            claims.setdefault(cid, set()).add(position)
        for cid, size in self._assembly.wanted().items():
            places = self._assembly.unfilled(cid) if cid in claims else []
            if places and {index for index, _ in places} <= claims[cid] and self._holds(descriptor, cid, places):
                self._assembly.add_leaf(cid, size)
                del claims[cid]
        with self._index.transaction() as db:
            db.executemany("DELETE FROM leaves WHERE file = ? AND cid = ?", ((self._number, cid) for cid in claims))
            layout = self._assembly.layout
            chunk = 0 if layout is None else layout.chunk
            db.execute("UPDATE files SET chunk = ? WHERE id = ?", (chunk, self._number))

    def _holds(self, descriptor: int, cid: bytes, places: list[tuple[int, int]]) -> bool:
        layout = self._assembly.layout
        for index, offset in places:
            with disk_errors(self._part, "read"):
                data = os.pread(descriptor, 0 if layout is None else layout.leaf_range(index)[1], offset)
            if hashlib.sha256(leaf_block(cid, bytes(self._cover(data, offset)))).digest() != cid[4:]:
                return False
        return True
