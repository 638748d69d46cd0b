"""One fetch's search outside the mesh for what no peer gives: the whole file in one go first, then its blocks."""

from __future__ import annotations

from typing import Final, Protocol

import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.ipfs.source_order import OnBlock
from meshnode.services.content.session import Session
from protocols.ids import DAG_PB, Cid, cid_from_bytes, cid_to_bytes

BLOCKS_AT_ONCE: Final = 4
TREE_BYTES: Final = 4 << 20  # a smaller file is not worth a request for all of it
TREE_SHARE: Final = 0.75  # nor is one of which less than this is missing
PAUSE_S: Final = 0.5  # at least, between attempts that found nothing


class Outside(Protocol):
    """Sources outside the mesh as one (`meshnode/ipfs/source_order.py`)."""

    async def block(self, cid: Cid) -> bytes:
        """One verified block. Raises ContentUnavailable."""

    async def tree(self, root: Cid, size: int, on_block: OnBlock) -> None:
        """The verified blocks of a file of `size` bytes in one go, parents first. Raises ContentUnavailable."""

    def so_far(self, cid: Cid) -> str:
        """What was said to a question for this block that is under way; empty without one."""


class Patience(Protocol):
    """How long a fetch waits for peers (`sources.py`)."""

    def outside_after_s(self, session: Session) -> float:
        """Seconds without a block from a peer until others are asked."""


class Search:
    """Asks sources outside as long as no peer gives a block."""

    def __init__(self, session: Session, outside: Outside, patience: Patience) -> None:
        self._session = session
        self._outside = outside
        self._patience = patience
        self._under_way: list[Cid] = []
        self._said = ""  # by the sources, to the last question that has ended

    @property
    def trouble(self) -> str:
        """What the sources said to the last question that has ended; before, what they have said to one under way."""
        if self._said:
            return self._said
        said = (self._outside.so_far(cid) for cid in self._under_way)
        return next((f"sources outside the mesh: {words}" for words in said if words), "")

    async def run(self) -> None:
        """Search until cancelled."""
        await self._take_tree()
        while True:
            quiet, patience = self._session.quiet_s, self._patience.outside_after_s(self._session)
            wanted = self._session.unasked(BLOCKS_AT_ONCE) if quiet >= patience else ()
            found: list[Cid] = []
            async with trio.open_nursery() as nursery:
                for name in wanted:
                    nursery.start_soon(self._find, cid_from_bytes(name), found)
            if not found:
                await trio.sleep(max(PAUSE_S, patience - quiet))

    async def _find(self, cid: Cid, found: list[Cid]) -> None:
        self._under_way.append(cid)
        try:
            block = await self._outside.block(cid)
        except ContentUnavailable as error:
            self._said = str(error)
            return
        finally:
            self._under_way.remove(cid)
        found.append(cid)
        await self._take(cid_to_bytes(cid), block)

    async def _take(self, cid: bytes, block: bytes) -> None:
        # Other fetches may want it, too. This is short: who has ended takes nothing.
        with trio.CancelScope(shield=True):
            await self._session.found(cid, block)

    async def _take_tree(self) -> None:
        """Take the whole file, if most of it is missing, until a peer gives a block."""
        session = self._session
        while (wait := self._patience.outside_after_s(session) - session.quiet_s) > 0:  # noqa: ASYNC110 - a peer's block puts it off
            await trio.sleep(wait)
        size = session.size
        if size < TREE_BYTES or size - session.done_bytes < TREE_SHARE * size:
            return
        fed_at = session.fed_at

        async def take(cid: bytes, block: bytes) -> None:
            await self._take(cid, block)
            if cid[1] == DAG_PB:
                await session.all_written()  # its children are not wanted before
            if session.fed_at != fed_at:
                peers_give.cancel()

        with trio.CancelScope() as peers_give:
            self._under_way.append(session.root)
            try:
                await self._outside.tree(session.root, size, take)
            except ContentUnavailable as error:
                self._said = str(error)
            finally:
                self._under_way.remove(session.root)
