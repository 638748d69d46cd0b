"""What learning stands on: what this node is, and what the other services do for it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from meshnode.core.clock import Wall
from meshnode.core.errors import DiskError
from meshnode.core.workers import Workers
from meshnode.services.port import Content, Notices, RecordSigner, Rights
from protocols.ids import Cid, PeerId


class Keeper(Protocol):
    """What we need of the store (`store/port.py`)."""

    def add_file(self, source: Path, *, pin: str) -> Cid: ...

    def put_block(self, data: bytes, codec: int) -> Cid: ...

    def pin(self, cid: Cid, name: str) -> None: ...

    def pin_only(self, name: str, cids: Collection[Cid]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    us: PeerId
    signer: RecordSigner
    notices: Notices
    rights: Rights
    content: Content
    store: Keeper
    workers: Workers
    wall: Wall

    async def keep(self, data: bytes, folder: Path, pin: str) -> Cid:
        """Have bytes in the store, where the others fetch them.

        Args:
          folder: for what is on its way there.

        Raises DiskError.
        """

        def store() -> Cid:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder, prefix="delta-") as file:
                    file.write(data)
                    file.flush()
                    return self.store.add_file(Path(file.name), pin=pin)
            except OSError as error:
                raise DiskError(f"A delta can't be written into {folder}: {error.strerror or error}.") from error

        return await self.workers.run(store)
