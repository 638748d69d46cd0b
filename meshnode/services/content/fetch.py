"""The transfer of one file, or of one block, into the store."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import trio

from meshnode.core.errors import ContentUnavailable, Declined
from meshnode.core.log import get_logger
from meshnode.core.workers import Workers
from meshnode.services.content.exchange import Exchange
from meshnode.services.content.session import Session
from meshnode.services.content.sources import Asking, Sources
from meshnode.services.port import Progress
from meshnode.store.port import Partial, Store
from protocols.errors import MeshError
from protocols.ids import Cid, cid_codec, cid_to_bytes, short
from protocols.manifest.messages import FileRef

BLOCK_HINT_BYTES: Final = 1 << 16  # a single block of unknown size counts as this in a peer's window
BUSY_S: Final = 0.3  # between looks at a file that another process is fetching

Result = TypeVar("Result")

_log = get_logger("content")


class _Transfer:
    """One file on its way in, for everybody who waits for it."""

    def __init__(self, file: FileRef) -> None:
        self.file = file
        self.waiters = 0
        self.watchers: list[Progress] = []
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.done = False
        self.error: MeshError | None = None


class Transfers:
    """Every file that is on its way in, each once."""

    def __init__(self, store: Store, exchange: Exchange, sources: Sources, workers: Workers) -> None:
        self._store = store
        self._exchange = exchange
        self._sources = sources
        self._workers = workers
        self._under_way: dict[Cid, _Transfer] = {}
        self._to_begin, self._begun = trio.open_memory_channel[_Transfer](math.inf)

    async def run(self) -> None:
        """Transfer what is asked for until cancelled. If cancelled: those who wait are told to ask again."""
        async with trio.open_nursery() as nursery:
            async for transfer in self._begun:
                nursery.start_soon(self._run, transfer)

    async def file(self, file: FileRef, progress: Progress | None) -> None:
        """Have a file in the store that is not there; see `Content.fetch`. Two calls share the transfer.

        If cancelled: it goes on if somebody else waits for it.
        """
        transfer = self._under_way.get(file.cid)
        if transfer is None or transfer.file.size != file.size:
            transfer = self._under_way[file.cid] = _Transfer(file)
            self._to_begin.send_nowait(transfer)
        transfer.waiters += 1
        if progress is not None:
            transfer.watchers.append(progress)
        try:
            await transfer.ended.wait()
        finally:
            transfer.waiters -= 1
            if progress is not None:
                transfer.watchers.remove(progress)
            if not transfer.waiters and not transfer.ended.is_set():
                self._forget(transfer)
                transfer.scope.cancel()
        if not transfer.done:
            raise transfer.error or ContentUnavailable(
                f"the transfer of {file.cid} was stopped; ask for it again", cid=file.cid
            )

    async def block(self, cid: Cid) -> bytes:
        """A block that is not in the store; see `Content.block`."""

        async def take(session: Session, asking: Asking) -> bytes:
            await session.want({cid_to_bytes(cid): BLOCK_HINT_BYTES})
            with trio.move_on_after(self._sources.patience_s):
                ((_, data),) = await session.receive()
                return bytes(data)
            raise asking.unavailable()

        block = await self._ask_around(self._exchange.open(cid), take)
        await self._workers.run(self._store.put_block, block, cid_codec(cid))
        return block

    async def _ask_around(self, session: Session, take: Callable[[Session, Asking], Awaitable[Result]]) -> Result:
        """What `take` gives, while everybody is asked. Raises what it raises."""
        asking = self._sources.asking(session)
        failure: MeshError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asking.run)
            try:
                result = await take(session, asking)
            except MeshError as error:
                failure = error
            finally:
                session.close()
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return result

    async def _run(self, transfer: _Transfer) -> None:
        try:
            with transfer.scope:
                await self._transfer(transfer)
                transfer.done = True
        except MeshError as error:
            transfer.error = error
        finally:
            self._forget(transfer)
            transfer.ended.set()

    def _forget(self, transfer: _Transfer) -> None:
        if self._under_way.get(transfer.file.cid) is transfer:
            del self._under_way[transfer.file.cid]

    async def _transfer(self, transfer: _Transfer) -> None:
        file = transfer.file
        partial = await self._open_partial(file)
        if isinstance(partial, Path):
            return

        async def take(session: Session, asking: Asking) -> None:
            await session.want(partial.wanted())
            while not partial.complete:
                with trio.move_on_after(self._sources.patience_s) as limit:
                    blocks = await session.receive()
                if limit.cancelled_caught:
                    if asking.hopeful:
                        continue
                    raise asking.unavailable()
                wanted = await self._workers.run(partial.write, blocks)
                self._exchange.answers.stored(cid for cid, _ in blocks)
                await session.want(wanted)
                session.written(len(blocks), partial.done_bytes)
                for watcher in transfer.watchers:
                    watcher(partial.done_bytes, file.size)

        try:
            await self._ask_around(self._exchange.open(file.cid, file.size, partial.done_bytes), take)
            await self._workers.run(partial.finish)
        finally:
            partial.close()
        _log.debug("file.fetched", cid=short(file.cid), size_bytes=file.size)

    async def _open_partial(self, file: FileRef) -> Partial | Path:
        """Wait while another process fetches the same file into the same folder."""
        while True:
            try:
                return await self._workers.run(self._store.open_partial, file.cid, file.size)
            except Declined:
                await trio.sleep(BUSY_S)
