"""One fetch's search outside the mesh for what no peer gives: the whole file in one go first, then its blocks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.ipfs.fallback import OnBlock
from protocols.ids import DAG_PB, Cid, cid_from_bytes, cid_to_bytes

BLOCKS_AT_ONCE: Final = 4
TREE_BYTES: Final = 4 << 20  # a smaller file is not worth a request for all of it
TREE_SHARE: Final = 0.75  # nor is one of which less than this is missing
PAUSE_SECONDS: Final = 0.5  # at least, between attempts that found nothing

FromOutside = Callable[[Cid], Awaitable[bytes]]  # one verified block; raises ContentUnavailable
SoFar = Callable[[Cid], str]  # what was said to a question for a block that is under way; empty: there is none
TreeFromOutside = Callable[[Cid, int, OnBlock], Awaitable[None]]  # (root, bytes of the file, taker); raises the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a search sees of the fetch that it serves."""

    root: Cid
    size: int  # bytes of the file; 0: a block of its own
    fed: Callable[[], float]  # when a peer gave its last verified block, or when the fetch began; monotonic seconds
    patience: Callable[[], float]  # seconds without a block from a peer until others are asked
    unasked: Callable[[int], Sequence[bytes]]  # so many binary CIDs that are wanted and asked of no peer
    found: Callable[[bytes, bytes], Awaitable[None]]  # takes a verified block by its binary CID


class Search:
    """Asks sources outside as long as no peer gives a block."""

    def __init__(
        self,
        session: Session,
        block: FromOutside,
        tree: TreeFromOutside | None,
        *,
        so_far: SoFar | None = None,
        done: int = 0,
    ) -> None:
        """`done`: bytes of the file that are here."""
        self._session = session
        self._block = block
        self._tree = tree
        self._so_far = so_far
        self._under_way: list[Cid] = []
        self._said = ""  # by the sources, to the last question that has ended
        self._done = done
        self._delivered = 0
        self._settled = 0
        self._changed = trio.Event()
        self.scope = trio.CancelScope()  # cancel it when the fetch has ended

    @property
    def trouble(self) -> str:
        """What the sources said last, or have said until now to the question that is under way."""
        for cid in self._under_way:
            if self._so_far is not None and (words := self._so_far(cid)):
                return f"sources outside the mesh: {words}"
        return self._said

    async def run(self) -> None:
        """Search until `scope` is cancelled."""
        with self.scope:
            if self._tree is not None:
                await self._take_tree(self._tree)
            while True:
                quiet, patience = self._quiet(), self._session.patience()
                wanted = self._session.unasked(BLOCKS_AT_ONCE) if quiet >= patience else ()
                found: list[Cid] = []
                async with trio.open_nursery() as nursery:
                    for name in wanted:
                        nursery.start_soon(self._find, cid_from_bytes(name), found)
                if not found:
                    await trio.sleep(max(PAUSE_SECONDS, patience - quiet))

    def deliver(self) -> None:
        """A block is on its way to the disk."""
        self._delivered += 1

    def settle(self, blocks: int, done: int) -> None:
        """So many were written, and it is known what they lead to; `done`: bytes of the file that are here."""
        self._settled += blocks
        self._done = done
        self._changed.set()
        self._changed = trio.Event()

    def _quiet(self) -> float:
        """Seconds since a peer gave a block."""
        return trio.current_time() - self._session.fed()

    async def _find(self, cid: Cid, found: list[Cid]) -> None:
        self._under_way.append(cid)
        try:
            block = await self._block(cid)
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

    async def _take_tree(self, tree: TreeFromOutside) -> None:
        """Take the whole file, if most of it is missing, until a peer gives a block."""
        while (wait := self._session.patience() - self._quiet()) > 0:  # noqa: ASYNC110 - a peer's block puts it off
            await trio.sleep(wait)
        size = self._session.size
        if size < TREE_BYTES or size - self._done < TREE_SHARE * size:
            return
        fed = self._session.fed()

        async def take(cid: bytes, block: bytes) -> None:
            await self._take(cid, block)
            if cid[1] == DAG_PB:
                await self._all_settled()  # its children are not wanted before
            if self._session.fed() != fed:
                peers_give.cancel()

        with trio.CancelScope() as peers_give:
            self._under_way.append(self._session.root)
            try:
                await tree(self._session.root, size, take)
            except ContentUnavailable as error:
                self._said = str(error)
            finally:
                self._under_way.remove(self._session.root)

    async def _all_settled(self) -> None:
        """Wait for all that were delivered until now."""
        target = self._delivered
        while self._settled < target:
            await self._changed.wait()
