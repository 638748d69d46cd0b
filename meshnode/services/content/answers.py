"""Answers to what peers want: blocks are loaded from the store in the order that the answering machine gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

import trio

from meshnode.core.errors import DiskError
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.core.workers import Workers
from meshnode.services.content.access import Access
from meshnode.services.content.outbox import Outboxes
from meshnode.store.port import Store
from protocols.bitswap.messages import Block, Message, Presence, PresenceType, modern, prefix_of, spellings
from protocols.bitswap.server import Answer, Server
from protocols.ids import PeerId, short

UNDER_WAY: Final = 24  # loaded and not yet written, all peers together: 24 MiB

_log = get_logger("content")


class Answers:
    """The wantlists of all peers."""

    def __init__(self, store: Store, access: Access, workers: Workers, outboxes: Outboxes) -> None:
        self._outboxes = outboxes
        self._store = store
        self._workers = workers
        self._server = Server(lambda cid: store.block_size(modern(cid)), access.may_have, access.is_member)
        self._places = trio.CapacityLimiter(UNDER_WAY)
        self._turn = Changes()  # somebody's answer may be due
        self.served_to: Counter[PeerId] = Counter()  # bytes of blocks that were written to the stream

    def take(self, peer: PeerId, message: Message) -> None:
        """What a peer wants, or does not want any more."""
        if message.entries or message.full:
            self._server.handle(peer, message)
            self._turn.notify()

    def stored(self, cids: Iterable[bytes]) -> None:
        """Blocks that we hold from now on; wishes for them have waited."""
        if self._server.added([name for cid in cids for name in spellings(cid)]):
            self._turn.notify()

    def gone(self, peer: PeerId) -> None:
        """It is not connected any more: its wishes are forgotten."""
        self._server.gone(peer)

    async def run(self) -> None:
        """Load and hand over until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                version = self._turn.version
                while True:
                    await self._places.acquire_on_behalf_of(token := object())
                    answer = self._server.next()
                    if answer is None:
                        self._places.release_on_behalf_of(token)
                        break
                    nursery.start_soon(self._load, answer, token)
                await self._turn.wait(version)

    async def _load(self, answer: Answer, token: object) -> None:
        try:
            blocks = await self._workers.run(self._store.read_blocks, [modern(cid) for cid in answer.blocks])
        except DiskError as error:
            _log.error("block.unreadable", peer=short(answer.peer), reason=str(error))
            blocks = [None] * len(answer.blocks)
        found = [(cid, data) for cid, data in zip(answer.blocks, blocks, strict=True) if data is not None]
        gone = [
            (cid, PresenceType.DONT_HAVE) for cid, data in zip(answer.blocks, blocks, strict=True) if data is None
        ]
        size = sum(len(data) for _, data in found)

        def sent(written: bool) -> None:
            self._places.release_on_behalf_of(token)
            if written:
                self.served_to[answer.peer] += size
            self._server.done(answer.peer)
            self._turn.notify()

        message = Message(
            blocks=tuple(Block(prefix=prefix_of(cid), data=data) for cid, data in found),
            presences=tuple(Presence(cid=cid, type=kind) for cid, kind in (*answer.presences, *gone)),
            pending_bytes=answer.pending_bytes,
        )
        self._outboxes.of(answer.peer).answer(message, sent)
