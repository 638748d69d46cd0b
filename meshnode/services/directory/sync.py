"""Anti-entropy: two nodes give each other the records that the other lacks. See protocols/sync/SPEC.md.

It repairs what gossip lost: with every peer as soon as it is connected, then with a random one every `SYNC_S`.
"""

from __future__ import annotations

import random
from typing import Final

import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.net.message_stream import MessageStream, open_messages
from meshnode.net.port import Host, Stream
from meshnode.services.directory.book import RecordBook
from meshnode.services.directory.contest import ASK_S
from protocols.backoff import Backoff
from protocols.bucket import Buckets
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.sync.machine import Effect, Finished, Send, SyncMachine, Take
from protocols.sync.messages import PROTOCOL, SYNC, TIMEOUT_S, Message

SYNC_S: Final = 10.0  # between exchanges with a random peer
RETRY_FIRST_S, RETRY_CAP_S = 0.1, 1.0  # between attempts to sync with a peer that has just connected
GIVE_UP_S: Final = 20.0  # membership is settled long before, or never
ASK_AROUND_S: Final = 1.5  # after a peer disconnected, somebody else is asked for news of it
MAX_STREAMS: Final = 2  # that one peer may have open with us
EXCHANGES_PER_S: Final = (
    1.0  # that one peer may begin; ours begin one in ten seconds, or in two while keys are contested
)
EXCHANGE_BURST: Final = 20.0
USELESS_PER_S: Final = 20.0  # records of one peer that were no news; beyond, its next ones are taken more slowly
USELESS_BURST: Final = 1000.0  # to who has just joined, many records are those of strangers

_log = get_logger("directory")


class Sync:
    """Exchanges of records with peers."""

    def __init__(self, host: Host, topic: str, book: RecordBook, rng: random.Random) -> None:
        """Registers the protocol: make it before `host.run`. `topic`: of the gossip, for what is news here."""
        self._host = host
        self._topic = topic
        self._book = book
        self._rng = rng
        self._synced: set[PeerId] = set()  # exchanged with us since they connected
        self._streams: dict[PeerId, int] = {}
        self._exchanges = Buckets(EXCHANGES_PER_S, EXCHANGE_BURST)
        self._useless = Buckets(USELESS_PER_S, USELESS_BURST)
        host.handle(PROTOCOL, self._answer)

    async def run(self) -> None:
        """Follow connections, and ask a random peer now and then, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sync_forever)
            async for event in self._host.events():
                self._synced.discard(event.peer)
                nursery.start_soon(self._sync_with if event.connected else self._ask_around, event.peer)

    async def _sync_with(self, peer: PeerId) -> None:
        """Sync with a peer as soon as it has admitted us and we it."""
        backoff = Backoff(RETRY_FIRST_S, RETRY_CAP_S)
        with trio.move_on_after(GIVE_UP_S):
            while peer in self._host.peers and peer not in self._synced:
                if await self._ask(peer):
                    return
                await trio.sleep(backoff.next())

    async def _ask_around(self, peer: PeerId) -> None:
        """A peer's connection went away: perhaps others still hear it."""
        await trio.sleep(ASK_AROUND_S)
        others = [other for other in self._host.peers if other in self._synced]
        if peer not in self._host.peers and others:
            await self._ask(self._rng.choice(others))

    async def _sync_forever(self) -> None:
        contest = self._book.contest
        while True:
            spread = self._rng.uniform(0.8, 1.2)  # not all nodes at the same moment
            if contest.is_watched:
                await trio.sleep(ASK_S * spread)
            else:
                version = contest.changes.version
                with trio.move_on_after(SYNC_S * spread):
                    await contest.changes.wait(version)
            peers = self._host.peers
            if peers:
                await self._ask(self._rng.choice(peers))

    async def _ask(self, peer: PeerId) -> bool:
        """One exchange that we begin; whether it came to its end."""
        try:
            with trio.fail_after(TIMEOUT_S):
                async with open_messages(self._host, peer, PROTOCOL, SYNC) as messages:
                    await self._exchange(messages, asking=True)
        except (PeerUnreachable, Declined, trio.TooSlowError) as error:
            _log.debug("sync.failed", peer=peer, reason=str(error))
            return False
        except RemoteProtocolError as error:
            _log.warning("sync.refused", peer=peer, reason=str(error))
            return False
        return True

    async def _answer(self, stream: Stream) -> None:
        """One exchange that a peer begins."""
        peer = stream.peer
        if self._streams.get(peer, 0) >= MAX_STREAMS:
            await stream.reset()
            return
        self._streams[peer] = self._streams.get(peer, 0) + 1
        try:
            with trio.fail_after(TIMEOUT_S):
                await self._pause(self._exchanges, peer)
                await self._exchange(MessageStream(stream, SYNC), asking=False)
        except trio.TooSlowError:
            await stream.reset()
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _exchange(self, messages: MessageStream[Message], *, asking: bool) -> None:
        """Run one side. Raises PeerUnreachable, or RemoteProtocolError when the peer breaks a rule."""
        machine = SyncMachine(self._book.versions(), self._book.shareable(messages.peer), asking=asking)
        if asking:
            await self._perform(machine.begin(), messages)
        while not machine.done:
            await self._perform(machine.handle(await messages.expect()), messages)

    async def _perform(self, effects: tuple[Effect, ...], messages: MessageStream[Message]) -> None:
        for effect in effects:
            match effect:
                case Send(message):
                    await messages.send(message)
                case Take(record, age_s):
                    if self._book.take(messages.peer, record, age_s):
                        # Two parts of a mesh may just have met; nobody renews what he says for that reason.
                        await self._host.publish(self._topic, record)
                        await trio.lowlevel.checkpoint()  # hundreds of signatures must not hold the loop
                    else:
                        await self._pause(self._useless, messages.peer)
                case Finished(sent, taken):
                    self._synced.add(messages.peer)
                    _log.debug("sync.finished", peer=messages.peer, sent=sent, taken=taken)

    async def _pause(self, allowances: Buckets, peer: PeerId) -> None:
        """Count one more of this peer, and let it wait for what is beyond its allowance."""
        now = trio.current_time()
        await trio.sleep(allowances.of(peer, now).spend(1.0, now, TIMEOUT_S))
