"""What services see of the content store. Implemented by `blob_store.py`.

`Content` is what everybody may use; `Store` adds what the content service needs to serve and to fetch.

A *file* is a UnixFS DAG named by its root CID, kept once on disk as a plain file; its blocks are ranges of
that file. A *block* is a small dag-cbor object (a manifest), kept whole.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from protocols.ids import Cid

LAST_PIN: Final = "mesh-last"  # protects copies that nobody else is sure to keep
SPARE_PIN: Final = "mesh-spare"  # weaker than every other pin: what it alone protects goes when room is needed


@dataclass(frozen=True, slots=True)
class StoreUsage:
    used_bytes: int
    quota_bytes: int
    free_disk_bytes: int
    room_bytes: int  # what could be added without touching anything pinned


class OpenFile:
    """A file whose bytes can be read at `path`, by child processes too, until it is closed."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """`descriptor`: of the copy in memory that `path` leads to."""
        self.path = path
        self._descriptor = descriptor

    def close(self) -> None:
        """What somebody has open or mapped stays so."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


class Content(Protocol):
    def path(self, cid: Cid) -> Path | None:
        """Where the complete, verified file lies, maybe encrypted; None while it is not (wholly) here."""

    def reveal(self, cid: Cid) -> OpenFile | None:
        """A complete file where it can be read by path; None while it is not here. Blocking: call it in a thread."""

    def block(self, cid: Cid) -> bytes | None:
        """Bytes of one block we hold, whatever it belongs to (a leaf, an inner node, a manifest)."""

    def put_block(self, data: bytes, codec: int) -> Cid:
        """Keep a block of its own (a manifest)."""

    def add_file(self, source: Path, *, pin: str) -> Cid:
        """Copy (or hard-link) a file into the store under its CID. Blocking: call it in a thread.

        Raises DiskError when there is no room, ModelError when the source can't be read.
        """

    def pin(self, cid: Cid, name: str) -> None:
        """Protect a file from eviction under this pin name."""

    def unpin(self, name: str) -> None:
        """Drop a pin name from every file."""

    def pin_only(self, name: str, cids: Collection[Cid]) -> None:
        """Have a pin name protect these and nothing else."""

    def files(self) -> frozenset[Cid]:
        """CIDs of the complete files and blocks held."""

    def version(self) -> int:
        """Another number after every change, whichever process made it. Costs next to nothing."""

    def usage(self) -> StoreUsage: ...


class Partial(Protocol):
    """A file that is being fetched: verified blocks go in, in any order, and are safe against a kill.

    Its methods block (disk); call them in a thread, one at a time.
    """

    @property
    def size(self) -> int:
        """Bytes of the whole file."""

    @property
    def done_bytes(self) -> int:
        """Bytes of the file that are verified and written."""

    @property
    def complete(self) -> bool: ...

    def wanted(self) -> dict[bytes, int]:
        """Missing blocks that are known by name: binary CID -> bytes (an upper bound for the root)."""

    def write(self, blocks: Sequence[tuple[bytes, bytes | bytearray | memoryview]]) -> dict[bytes, int]:
        """Keep blocks whose hash the caller has checked; returns what is wanted from now on besides.

        Raises ModelError when the tree under this CID is not a file of this size, DiskError.
        """

    def finish(self) -> Path:
        """Make it a file of the store (fsync, atomic rename) and close. Only when `complete`."""

    def close(self) -> None:
        """Stop here; what was written is found again by the next `open_partial`."""


class Store(Content, Protocol):
    def open_partial(self, cid: Cid, size: int) -> Partial | Path:
        """Begin or go on with a fetch; the path when the file is complete. Blocking: call it in a thread.

        Every block left by an earlier fetch is hashed again before it counts.
        Raises DiskError (quota, no room), ModelError (no file of this size can have this CID), Declined
        `busy` when another process fetches it into the same folder.
        """

    def block_size(self, cid: bytes) -> int | None:
        """Bytes of a block that we hold under this binary CID, whatever it belongs to; None if we do not."""

    def read_blocks(self, cids: Sequence[bytes]) -> list[bytes | None]:
        """Bytes of blocks by binary CID; None for one that is gone. Blocking: call it in a thread."""
