"""Files and blocks by content address, from the store or from whoever has them; and the same for others.

The front of this folder: `fetch.py` transfers, `sources.py` asks around, `exchange.py` talks with peers, `access.py`
says who may have what. Hashing and writing run in worker threads, in batches, while the event loop reads on.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.core.workers import Limited, Workers
from meshnode.net.port import Host
from meshnode.services.content.access import Access
from meshnode.services.content.exchange import Exchange
from meshnode.services.content.fetch import Transfers
from meshnode.services.content.sources import Sources
from meshnode.services.port import Adverts, Progress
from meshnode.store.port import OpenFile, Store
from protocols.ids import Cid, PeerId
from protocols.manifest.messages import FileRef

THREADS: Final = 6


class ContentService:
    """Fetches and serves content-addressed bytes. Make it before `host.run`; what is asked before `run` waits."""

    name = "content"

    def __init__(
        self,
        host: Host,
        store: Store,
        adverts: Adverts,
        sources: Sources,
        access: Access,
        health: Health,
        workers: Workers,
    ) -> None:
        """`workers`: where disks and hashes are waited for."""
        self.access = access
        self._store = store
        self._workers = Limited(workers, THREADS)
        self._exchange = Exchange(host, store, adverts, access, health, self._workers)
        self._transfers = Transfers(store, self._exchange, sources, self._workers)

    @property
    def fetched_from(self) -> Counter[PeerId]:
        """Bytes of blocks that came, also wrong or double ones."""
        return self._exchange.fetched_from

    @property
    def served_to(self) -> Counter[PeerId]:
        """Bytes of blocks that were written to the stream."""
        return self._exchange.answers.served_to

    @property
    def bytes_fetched(self) -> int:
        """Bytes of blocks received from anybody since the start."""
        return self.fetched_from.total()

    @property
    def bytes_served(self) -> int:
        """Bytes of blocks sent to anybody since the start."""
        return self.served_to.total()

    def bad_providers(self) -> dict[PeerId, str]:
        """Peers that are not asked any more since they sent wrong bytes or broke the protocol, with what they did."""
        return dict(self._exchange.client.banned)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve and fetch until cancelled. If cancelled: running fetches stop and can be taken up again."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._exchange.run)
            nursery.start_soon(self._transfers.run)
            task_status.started()

    async def fetch(self, file: FileRef, *, progress: Progress | None = None) -> None:
        """Have the complete, verified file in the store, from there or from peers.

        Two calls for one CID share the transfer. `progress` is called with bytes done and in all.
        Raises ContentUnavailable (nobody gave a block for a while), ModelError (no file of this size has this
        CID), DiskError. If cancelled: what has come is kept for the next fetch, unless somebody else waits for
        it, in which case it goes on.
        """
        if await self._workers.run(self._store.path, file.cid) is None:
            await self._transfers.file(file, progress)
        elif progress is not None:
            progress(file.size, file.size)

    async def open(self, file: FileRef, *, progress: Progress | None = None) -> OpenFile:
        """Fetch it and open it where it can be read by path, whether it is encrypted or not. Close it.

        Raises what `fetch` raises. If cancelled: as there.
        """
        await self.fetch(file, progress=progress)
        opened = await self._workers.run(self._store.reveal, file.cid)
        if opened is None:
            raise ContentUnavailable(
                f"the file {file.cid} was removed while it was being opened; ask again", cid=file.cid
            )
        return opened

    async def block(self, cid: Cid) -> bytes:
        """One block (a manifest), from the store or from peers; it is kept in the store.

        Raises ContentUnavailable, DiskError. If cancelled: nothing was kept.
        """
        held = await self._workers.run(self._store.block, cid)
        return await self._transfers.block(cid) if held is None else held
