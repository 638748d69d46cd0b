"""What services see of the content store. Implemented by `blob_store.py`.

A *file* is a UnixFS DAG named by its root CID, kept once on disk as a plain file; its blocks are ranges of
that file. A *block* is a small dag-cbor object (a manifest), kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protocols.ids import Cid


@dataclass(frozen=True, slots=True)
class StoreUsage:
    used_bytes: int
    quota_bytes: int
    free_disk_bytes: int


class Content(Protocol):
    def path(self, cid: Cid) -> Path | None:
        """The complete, verified file; None while it is not (wholly) here."""

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

    def files(self) -> frozenset[Cid]:
        """CIDs of the complete files and blocks held."""

    def usage(self) -> StoreUsage: ...
