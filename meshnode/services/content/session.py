"""What one fetch wants, whom it asks, and what has come for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

import trio

from meshnode.core.signal import Changes
from protocols.bitswap import client as asking
from protocols.bitswap.messages import Buffer
from protocols.ids import Cid, PeerId

INBOX_BLOCKS: Final = 8  # verified blocks that wait for the disk
BATCH_BLOCKS: Final = 8  # blocks written by one visit to a thread and one transaction

Blocks = list[tuple[bytes, Buffer]]  # (binary CID, verified bytes)


class Asker(Protocol):
    """The asking machine of the node, and the streams to those who are asked (`exchange.py`)."""

    @property
    def client(self) -> asking.Client: ...

    @property
    def online_s(self) -> float:
        """Seconds since the service has begun; below 0 before."""

    @property
    def last_block_at(self) -> float:
        """When the last verified block came, for any fetch."""

    async def handle(self, event: asking.Event) -> None: ...

    def include(self, session: int, peer: PeerId) -> None:
        """A session asks this peer from now on."""

    def close(self, session: int) -> None: ...

    def words(self, session: int) -> list[str]:
        """What became of everybody who was asked, for people."""


class Session:
    """One file, or one block of its own, while it is being fetched."""

    def __init__(self, exchange: Asker, number: int, root: Cid, size: int, done_bytes: int) -> None:
        """
        Args:
          size: bytes of the file; 0: a block of its own.
          done_bytes: of the file, that are here.
        """
        self.root = root
        self.size = size
        self.done_bytes = done_bytes
        self.fed_at = trio.current_time()  # when a peer gave the last verified block, or this began
        self.exchange = exchange
        self._number = number
        self._into, self._inbox = trio.open_memory_channel[tuple[bytes, Buffer]](INBOX_BLOCKS)
        self._delivered = 0
        self._written = 0
        self._writes = Changes()
        self._closed = False

    @property
    def quiet_s(self) -> float:
        """Seconds since a peer gave a block."""
        return trio.current_time() - self.fed_at

    async def want(self, blocks: dict[bytes, int]) -> None:
        """More blocks: binary CID -> bytes, or an upper bound. If cancelled: they are wanted."""
        await self.exchange.handle(asking.Want(self._number, blocks))

    def usable(self, peers: Iterable[PeerId]) -> tuple[PeerId, ...]:
        """The same without those that are not asked any more."""
        return tuple(peer for peer in peers if peer not in self.exchange.client.banned)

    async def offer(self, peers: Iterable[PeerId]) -> None:
        """These are believed to have it."""
        await self._offer(peers, certain=True)

    async def consult(self, peers: Iterable[PeerId]) -> None:
        """Nobody knows what these hold: they are asked before they are relied on."""
        await self._offer(peers, certain=False)

    async def _offer(self, peers: Iterable[PeerId], *, certain: bool) -> None:
        offered = self.usable(peers)
        if self._closed:
            return
        for peer in offered:
            self.exchange.include(self._number, peer)
        await self.exchange.handle(asking.Offer(self._number, offered, certain=certain))

    def unasked(self, most: int) -> tuple[bytes, ...]:
        """Blocks that are wanted and asked of no peer."""
        return self.exchange.client.unasked(self._number, most)

    async def found(self, cid: bytes, block: bytes) -> None:
        """Take a verified block that came from elsewhere than a peer. Other fetches may want it, too."""
        await self.exchange.handle(asking.Found(cid, block))

    @property
    def owed(self) -> bool:
        """Whether somebody who is asked owes us blocks, of this fetch or another one."""
        client = self.exchange.client
        return any(client.awaited(peer) for peer in client.asked(self._number))

    def words(self) -> list[str]:
        """What became of everybody who was asked, for people."""
        return self.exchange.words(self._number)

    # What comes

    async def deliver(self, cid: bytes, data: Buffer) -> None:
        """A verified block. Waits while the disk is behind; nothing happens when the fetch has ended."""
        self._delivered += 1
        try:
            await self._into.send((cid, data))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def receive(self) -> Blocks:
        """At least one block, and those that wait behind it. If cancelled: nothing was taken."""
        batch = [await self._inbox.receive()]
        while len(batch) < BATCH_BLOCKS:
            try:
                batch.append(self._inbox.receive_nowait())
            except trio.WouldBlock:
                break
        return batch

    def written(self, blocks: int, done_bytes: int) -> None:
        """So many are on the disk, and it is known what they lead to."""
        self._written += blocks
        self.done_bytes = done_bytes
        self._writes.notify()

    async def all_written(self) -> None:
        """Wait until everything is that was delivered until now. If cancelled: nothing happened."""
        target = self._delivered
        while self._written < target:
            await self._writes.wait()

    def close(self) -> None:
        """Nothing is wanted any more. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._into.close()
            self._inbox.close()
            self.exchange.close(self._number)
