"""Blocks to and from peers: Bitswap over streams.

The machines of `protocols/bitswap` decide; this moves the bytes. Between two peers there is one stream per direction
on the bulk lane: ours carries our wishes and our answers, theirs carries theirs. Every queue is bounded, so a slow
disk slows the peers down and costs no memory.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.core.workers import Workers
from meshnode.net.port import Host, Lane, PeerEvent, Stream
from meshnode.services.content.access import Access
from meshnode.services.content.answers import Answers
from meshnode.services.content.outbox import Outbox, Outboxes, Pace
from meshnode.services.content.session import Session
from meshnode.services.port import Adverts
from meshnode.store.port import Store
from protocols.backoff import Backoff
from protocols.bitswap import client as asking
from protocols.bitswap.messages import PROTOCOL, Block, Buffer, Message, MessageReader, decode
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, PeerId, short

MAX_REMEMBERED: Final = 4096  # peers; whoever comes for our blocks is forgotten when it leaves
OTHERS: Final = PeerId("others")  # in the counts of bytes: those who were forgotten
OPEN_S: Final = 15.0  # a stream to a connected peer; its own connection for bulk may have to be made
FIRST_PAUSE_S: Final = 0.2  # between attempts to open a stream
LAST_PAUSE_S: Final = 10.0
IDLE_S: Final = 60.0  # an outgoing stream nobody needs is closed after this
RECEIVE_BYTES: Final = 1 << 18
UNVERIFIED_MESSAGES: Final = 2  # received, waiting for a hashing thread
VERIFIERS: Final = 2  # one hashes while the other hands over
INLINE_BYTES: Final = 1 << 15  # so little is hashed at once, without a thread

_log = get_logger("content")


class Exchange:
    """Asks peers for blocks and answers them. Make it before `host.run`."""

    def __init__(
        self, host: Host, store: Store, adverts: Adverts, access: Access, health: Health, workers: Workers
    ) -> None:
        """`adverts`: names of peers, for people. `workers`: where blocks are loaded and hashed."""
        self.client = asking.Client()
        self._outboxes = Outboxes(Pace(access.upload))
        self.answers = Answers(store, access, workers, self._outboxes)
        self.fetched_from: Counter[PeerId] = Counter()  # bytes of blocks that came, also wrong or double ones
        self.last_block_at = -math.inf  # when the last verified block came, for any session
        self._host = host
        self._adverts = adverts
        self._access = access
        self._health = health
        self._workers = workers
        self._began_at = math.inf
        self._asked: dict[PeerId, None] = {}  # peers that were asked for something, oldest first
        self._sessions: dict[int, Session] = {}
        self._numbers = itertools.count(1)
        self._sleeps_until: float | None = None
        self._sooner = Changes()  # the asking machine is to be woken
        self._to_verify, self._unverified = trio.open_memory_channel[tuple[PeerId, Message]](UNVERIFIED_MESSAGES)
        # Other implementations open a stream for each message; what they ask for is bounded by the ledger.
        host.handle(PROTOCOL, self._receive, open_to_strangers=access.public, bounded=False)

    @property
    def online_s(self) -> float:
        """Seconds since this runs; below 0 before."""
        return trio.current_time() - self._began_at

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Exchange until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            nursery.start_soon(self.answers.run)
            nursery.start_soon(self._follow_contest)
            nursery.start_soon(self._follow, self._host.events())
            nursery.start_soon(self._follow, self._host.guest_events())
            for _ in range(VERIFIERS):
                nursery.start_soon(self._verify)
            self._began_at = trio.current_time()
            task_status.started()
            async for outbox in self._outboxes.made():
                nursery.start_soon(self._keep, outbox)

    def open(self, root: Cid, size: int = 0, done_bytes: int = 0) -> Session:
        """Begin to fetch; close it."""
        number = next(self._numbers)
        session = self._sessions[number] = Session(self, number, root, size, done_bytes)
        return session

    def close(self, session: int) -> None:
        """What it wanted is not wanted any more, unless another one wants it."""
        del self._sessions[session]
        self._outboxes.leave(session)
        self._perform_sends(self.client.handle(asking.Close(session), trio.current_time()))

    def include(self, session: int, peer: PeerId) -> None:
        """A session asks this peer from now on."""
        self._asked[peer] = None
        if len(self._asked) > MAX_REMEMBERED:
            del self._asked[next(iter(self._asked))]
        self._outboxes.of(peer).sessions.add(session)

    def words(self, session: int) -> list[str]:
        """What became of everybody whom a session asked, for people."""
        out = []
        for peer, word in self.client.asked(session).items():
            outbox = self._outboxes.get(peer)
            trouble = outbox.trouble if outbox is not None and word == "not reachable" else ""
            out.append(f"{short(peer)} {word}" + (f" ({trouble})" if trouble else ""))
        return out

    # The asking machine and its effects

    async def handle(self, event: asking.Event) -> None:
        """Give the machine an event. Waits while the disk of a session is behind."""
        effects = self.client.handle(event, trio.current_time())
        self._perform_sends(effects)
        for effect in effects:
            if isinstance(effect, asking.Got):
                self.last_block_at = trio.current_time()
                for number in effect.sessions:
                    session = self._sessions.get(number)
                    if session is None:
                        continue  # it ended while we waited for another one
                    if effect.peer is not None:
                        session.fed_at = self.last_block_at
                    await session.deliver(effect.cid, effect.data)

    def _perform_sends(self, effects: Sequence[asking.Effect]) -> None:
        for effect in effects:
            match effect:
                case asking.Send(peer, message):
                    self._outboxes.of(peer).ask(message)
                case asking.Banned(peer, reason):
                    self._exclude(peer, reason)
                case asking.Stalled(peer, given_up):
                    _log.info("provider.stalled", peer=short(peer), given_up=given_up)
                    if given_up and (outbox := self._outboxes.get(peer)) is not None:
                        outbox.trouble = "it stopped answering"
                        outbox.drop()
                case asking.Got():
                    pass
        deadline = self.client.deadline
        if deadline is not None and (self._sleeps_until is None or deadline < self._sleeps_until):
            self._sooner.notify()

    def _exclude(self, peer: PeerId, deed: str) -> None:
        """Nothing is fetched from it any more; our owner is told, with the name that it has now."""
        _log.warning("provider.banned", peer=short(peer), reason=deed)
        if (outbox := self._outboxes.get(peer)) is not None:
            outbox.sessions.clear()
        advert = self._adverts.live().get(peer)
        self._health.set(
            "bad-provider",
            peer=f"{advert.name} ({short(peer)})" if advert is not None and advert.name else short(peer),
            deed=deed,
            check="`meshnode model verify`" if self._access.is_member(peer) else "`ipfs repo verify`",
        )

    async def _tick(self) -> None:
        """Wake the asking machine at its deadlines."""
        while True:
            version = self._sooner.version
            self._sleeps_until = self.client.deadline
            with trio.move_on_at(math.inf if self._sleeps_until is None else self._sleeps_until) as limit:
                await self._sooner.wait(version)
            if limit.cancelled_caught:
                await self.handle(asking.Tick())

    async def _follow_contest(self) -> None:
        """While another node has our key, what peers send may be meant for it: nobody is accused."""
        while True:
            version = self._adverts.changes.version
            me = self._adverts.live().get(self._host.peer_id)
            if me is not None and me.contested:
                await self.handle(asking.Contested())
                self._health.clear("bad-provider")
            await self._adverts.changes.wait(version)

    async def _follow(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        """Connections that come and go."""
        async for event in events:
            outbox = self._outboxes.get(event.peer)
            if event.connected:
                if outbox is not None:
                    outbox.wake()
                continue
            if event.peer in self._host.guests:
                continue  # it was a stranger and is a guest from now on; the connection is the same
            self.answers.gone(event.peer)
            if outbox is not None:
                outbox.trouble = event.reason
                outbox.clear()
                outbox.drop()
            if event.peer in self._asked:
                await self.handle(asking.PeerDown(event.peer))
            else:
                await self.handle(asking.Forget(event.peer))
                for counter in (self.answers.served_to, self.fetched_from):
                    counter[OTHERS] += counter.pop(event.peer, 0)

    # Streams out

    async def _keep(self, outbox: Outbox) -> None:
        """Keep a stream to a peer open while it is needed."""
        peer, backoff = outbox.peer, Backoff(FIRST_PAUSE_S, LAST_PAUSE_S)
        while outbox.needed:
            try:
                with trio.fail_after(OPEN_S):
                    stream = await self._host.open_stream(peer, PROTOCOL, Lane.BULK)
            except (PeerUnreachable, Declined, trio.TooSlowError) as error:
                outbox.trouble = str(error) or f"no stream within {OPEN_S:.0f} s"
                self.answers.gone(peer)
                outbox.clear()
                with trio.move_on_after(backoff.next()):
                    await outbox.wait()
                continue
            backoff.reset()
            outbox.trouble = ""
            try:
                await self.handle(asking.PeerUp(peer))
                await outbox.pump(stream, idle_s=IDLE_S)
            except PeerUnreachable as error:
                outbox.trouble = str(error)
            finally:
                self._perform_sends(self.client.handle(asking.PeerDown(peer), trio.current_time()))
                outbox.clear()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await stream.aclose()
        self._outboxes.forget(outbox)

    # Streams in

    async def _receive(self, stream: Stream) -> None:
        """Read one peer's wishes and answers. Raises RemoteProtocolError, which ends the stream."""
        peer = stream.peer
        reader = MessageReader()
        whole = False
        try:
            while data := await stream.receive_some(RECEIVE_BYTES):
                self.client.handle(asking.Progress(peer), trio.current_time())
                for raw in reader.feed(data):
                    await self._take(peer, decode(raw))
            whole = not reader.pending
        except RemoteProtocolError as error:
            await self.handle(asking.Misbehaved(peer, f"broke the protocol: {error}"))
            raise
        finally:
            # Its answers came over this stream. If it still owes some, ask anew over a fresh pair of streams.
            # An IPFS node opens a stream for every answer (go-bitswap does), so that the end of one says nothing.
            ended = whole and not self._access.is_member(peer)
            outbox = self._outboxes.get(peer)
            if self.client.owed(peer) and outbox is not None and not ended:
                outbox.drop()

    async def _take(self, peer: PeerId, message: Message) -> None:
        self.answers.take(peer, message)
        if message.blocks and peer in self.client.banned:
            raise RemoteProtocolError(f"{short(peer)} sends blocks although it was dropped")
        if message.blocks or message.presences:
            await self._to_verify.send((peer, message))

    async def _verify(self) -> None:
        """Hash what came and hand it to the asking machine."""
        async for peer, message in self._unverified:
            size = sum(len(block.data) for block in message.blocks)
            self.fetched_from[peer] += size
            if size > INLINE_BYTES:
                blocks = await self._workers.run(_identify, message.blocks)
            else:
                blocks = _identify(message.blocks)
            presences = [(presence.cid, presence.type) for presence in message.presences]
            await self.handle(asking.Arrived(peer, blocks, presences))


def _identify(blocks: Sequence[Block]) -> list[tuple[bytes | None, Buffer]]:
    return [(block.cid(), block.data) for block in blocks]
