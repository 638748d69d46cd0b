"""Who offers what, right now: keeps everybody's newest advert and head, publishes ours.

Records come by gossip and, for whatever gossip lost, by anti-entropy over a direct stream: with every peer as
soon as it is connected, then with a random one every `SYNC_SECONDS`. See protocols/advert and protocols/sync.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.net.port import Host, PeerEvent, Stream
from protocols.advert.messages import ADVERT, HEAD, RENEW_MS, Advert, Announcement, Holding
from protocols.advert.validate import check_advert, check_head
from protocols.advert.view import Outcome, View
from protocols.codec import encode
from protocols.envelope import MAX_RECORD_BYTES
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.ids import Cid, PeerId, cid_to_bytes
from protocols.sync.machine import Effect, Finished, Send, SyncMachine, Take
from protocols.sync.messages import MAX_MESSAGE, PROTOCOL, SYNC, TIMEOUT_S

COALESCE_S: Final = 0.05  # changes of our advert within this time are published as one
BURST: Final = 3  # adverts that may follow each other at once
RATE_PER_S: Final = 2.0  # adverts per second after a burst; GossipSub drops a peer's messages above 10 per second
HEAD_REPEATS: Final = 3  # a new head is gossiped with this many adverts; afterwards sync repairs
RENEW_S: Final = RENEW_MS / 1000
TICK_S: Final = 0.25  # between looks at leases and at certificates that were missing
REVIEW_S: Final = 5.0  # between looks at every certificate: they expire and are withdrawn
SYNC_SECONDS: Final = 10.0  # between exchanges with a random peer
RETRY_S: Final = (0.1, 1.0)  # between attempts to sync with a peer that has just connected: first, cap
GIVE_UP_S: Final = 20.0  # membership is settled long before, or never
ASK_AROUND_S: Final = 1.5  # after a peer disconnected, somebody else is asked for news of it
GOODBYE_S: Final = 1.0
MAX_SYNCS: Final = 2  # streams that one peer may have open with us
_ENVELOPE_BYTES: Final = 512  # of a record beside its payload, generously

_log = get_logger("directory")


class RecordStore(Protocol):
    """Signed records that outlive a restart: one per (kind, signer). Blocking and short."""

    def put_record(self, kind: str, signer: str, data: bytes) -> None: ...

    def records(self, kind: str) -> Mapping[str, bytes]:
        """Data by signer."""


def next_incarnation(store: RecordStore, us: PeerId, now_ms: int) -> int:
    """The incarnation of this start of the node: its wall clock, but always above the one before.

    A clock that was set back would otherwise make everybody ignore us: they hold a newer advert of ours.
    """
    kind = "incarnation"
    before = int.from_bytes(dict(store.records(kind)).get(us, b""), "big")
    now = max(now_ms, before + 1)
    store.put_record(kind, us, now.to_bytes(8, "big"))
    return now


@dataclass(slots=True)
class _Bucket:
    """Token bucket: `BURST` at once, then `RATE_PER_S`."""

    level: float
    at: float

    def wait_s(self, now: float) -> float:
        """Seconds until one may be taken."""
        self.level = min(float(BURST), self.level + (now - self.at) * RATE_PER_S)
        self.at = now
        return max(0.0, (1.0 - self.level) / RATE_PER_S)


class DirectoryService:
    """The newest advert of everybody and the heads of the publishers."""

    name = "directory"

    def __init__(
        self,
        host: Host,
        sign: Callable[[str, bytes], bytes],
        topic: str,
        clock: Wall,
        roles_of: Callable[[PeerId], frozenset[str] | None],
        initial: Advert,
        store: RecordStore,
        *,
        health: Health | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Registers the topic and the protocol: make it before `host.run`.

        Args:
          sign: (domain, payload) -> signed record, with the node's key.
          roles_of: roles of a member's certificate; None or empty for who is not known as a member.
          initial: our advert; `sequence` and `issued_ms` are set here, `addresses` when empty are the host's.
        """
        self._host = host
        self._us = host.peer_id
        self._sign = sign
        self._topic = topic
        self._clock = clock
        self._roles_of = roles_of
        self._store = store
        self._health = health
        self._rng = rng or random.Random()
        self._view = View(roles_of)
        self._me = replace(initial, peer=self._us, sequence=0, issued_ms=0)
        self._listens = not initial.addresses  # our addresses are those of the host, once it listens
        self.changes = Changes()
        self._dirty = trio.Event()
        self._head_record = b""  # our head, gossiped with the next `_head_left` adverts
        self._head_left = 0
        self._lively: frozenset[PeerId] = frozenset()
        self._synced: set[PeerId] = set()  # exchanged with us since they connected
        self._streams: dict[PeerId, int] = {}
        for data in store.records(HEAD).values():
            try:
                self._view.accept(data, 0.0)
            except RemoteProtocolError as error:
                _log.warning("head.forgotten", reason=str(error))
        self._gossip = host.subscribe(topic, self._worth_passing)
        host.handle(PROTOCOL, self._answer)

    # What others read

    def live(self) -> dict[PeerId, Advert]:
        """Adverts that hold now, ours included (unless we are leaving), sorted by peer id."""
        adverts = {
            peer: entry.body
            for peer, entry in self._view.alive(ADVERT, self._now()).items()
            if isinstance(entry.body, Advert) and peer != self._us
        }
        if not self._me.leaving:
            adverts[self._us] = self._me
        return dict(sorted(adverts.items()))

    def me(self) -> Advert:
        """Our own advert, with changes that are not published yet."""
        return self._me

    def announcements(self) -> dict[PeerId, Announcement]:
        """The newest announcement of every publisher, those taken back too, sorted by publisher."""
        entries = self._view.alive(HEAD, self._now())
        return {peer: entry.body for peer, entry in entries.items() if isinstance(entry.body, Announcement)}

    def announcement(self) -> Announcement | None:
        """The release that the network serves: the newest announcement that is not taken back."""
        held = [one for one in self.announcements().values() if not one.retired]
        return min(held, key=lambda one: (-one.created_ms, one.manifest, one.peer), default=None)

    def addresses(self) -> dict[PeerId, tuple[str, ...]]:
        """Where the others say they listen."""
        return {peer: advert.addresses for peer, advert in self.live().items() if peer != self._us}

    def providers(self, cid: Cid) -> list[PeerId]:
        """Peers that have a file or block, never ourselves: connected first, then by round trip."""
        wanted = cid_to_bytes(cid)
        holders = [peer for peer, entry in self._view.alive(ADVERT, self._now()).items() if wanted in entry.cids]
        connected = frozenset(self._host.peers)

        def rank(peer: PeerId) -> tuple[bool, float, PeerId]:
            trip = self._host.round_trip_us(peer) if peer in connected else None
            return peer not in connected, math.inf if trip is None else trip, peer

        return sorted((peer for peer in holders if peer != self._us), key=rank)

    def age_s(self, peer: PeerId) -> float | None:
        """Seconds since the peer's advert last changed its sequence number; 0 for us, None if never heard of."""
        if peer == self._us:
            return 0.0
        entry = self._view.get(ADVERT, peer)
        return None if entry is None else max(0.0, self._now() - entry.since)

    # What we say

    def advertise(self, advert: Advert) -> None:
        """Publish `dataclasses.replace(directory.me(), ...)` within `COALESCE_S`, a few times per second at most.

        Raises LocalProtocolError for a value that others would refuse; nothing is changed then.
        """
        if _fixed(advert) != _fixed(self._me):
            raise LocalProtocolError("peer, incarnation, sequence and date of an advert are not the caller's to set")
        self._set_me(advert)

    def announce(
        self, *, name: str, version: str, manifest: Cid, variant: str, retired: bool = False
    ) -> Announcement:
        """Say that the network serves this release from now on (or no longer). Replaces what we said before.

        Raises Declined `forbidden` without the role "publish", LocalProtocolError for a value that others
        would refuse.
        """
        if "publish" not in (self._roles_of(self._us) or frozenset()):
            raise Declined("forbidden", "This node may not publish models: its certificate lacks the role publish.")
        mine = self._view.get(HEAD, self._us)
        incarnation, sequence = (self._me.incarnation, 0) if mine is None else mine.version
        if incarnation < self._me.incarnation:
            incarnation, sequence = self._me.incarnation, 0
        newest = max((one.created_ms for one in self.announcements().values()), default=0)
        head = Announcement(
            peer=self._us,
            incarnation=incarnation,
            sequence=sequence + 1,
            created_ms=max(self._clock(), newest + 1),  # ours is the newest, even if a publisher's clock is ahead
            name=name,
            version=version,
            manifest=manifest,
            variant=variant,
            retired=retired,
        )
        try:
            check_head(head, self._us)
        except RemoteProtocolError as error:
            raise LocalProtocolError(str(error)) from None
        self._head_record, self._head_left = self._sign(HEAD, encode(head)), HEAD_REPEATS
        self._take(self._head_record, own=True)
        self._dirty.set()
        return head

    async def goodbye(self) -> None:
        """Tell everybody that we leave, at once. If cancelled: perhaps not everybody knows."""
        self._set_me(replace(self._me, leaving=True))
        with trio.move_on_after(GOODBYE_S):
            await self._publish()

    # The service

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish, listen and repair until cancelled. Start it when the host listens."""
        if self._listens:
            self._set_me(replace(self._me, addresses=self._host.addresses[:16]))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publish_forever)
            nursery.start_soon(self._drain_gossip)
            nursery.start_soon(self._look_at_leases)
            nursery.start_soon(self._sync_forever)
            events = self._host.events()
            task_status.started()
            async for event in events:
                self._connection(event, nursery)

    def _connection(self, event: PeerEvent, nursery: trio.Nursery) -> None:
        self._synced.discard(event.peer)
        if event.connected:
            nursery.start_soon(self._welcome, event.peer)
        else:
            self._view.suspect(event.peer, self._now())
            nursery.start_soon(self._ask_around, event.peer)

    async def _publish_forever(self) -> None:
        bucket = _Bucket(float(BURST), self._now())
        while True:
            await trio.sleep(bucket.wait_s(self._now()))
            bucket.level -= 1.0
            self._dirty = trio.Event()
            await self._publish()
            with trio.move_on_after(RENEW_S):
                await self._dirty.wait()
                await trio.sleep(COALESCE_S)

    async def _publish(self) -> None:
        """Our next advert, and a head that was published lately."""
        self._me = replace(self._me, sequence=self._me.sequence + 1, issued_ms=self._clock())
        record = self._sign(ADVERT, encode(_fitting(self._me)))
        self._take(record, own=True)
        await self._host.publish(self._topic, record)
        if self._head_left:
            self._head_left -= 1
            await self._host.publish(self._topic, self._head_record)

    async def _drain_gossip(self) -> None:
        async for _ in self._gossip:
            pass  # `_worth_passing` has taken the record already, so that each is checked once

    async def _look_at_leases(self) -> None:
        """Notice who expired, who left, and whose certificate has come or gone."""
        reviewed = self._now()
        while True:
            await trio.sleep(TICK_S)
            everybody = self._now() - reviewed >= REVIEW_S
            if everybody:
                reviewed = self._now()
            changed = self._view.review(strangers_only=not everybody)
            lively = frozenset(self._view.alive(ADVERT, self._now()))
            for peer in sorted(self._lively - lively):
                _log.info("peer.expired", peer=peer)
            if changed:
                self._keep_heads()
            if changed or self._lively - lively:
                self._note_change()

    def _keep_heads(self) -> None:
        for peer, entry in self._view.alive(HEAD, self._now()).items():
            self._store.put_record(HEAD, peer, entry.record)

    # Records

    def _worth_passing(self, forwarder: PeerId, data: bytes) -> bool:
        """The topic's validator: takes the record; only what is new is passed on."""
        return self._take_from(forwarder, data) in (Outcome.CHANGED, Outcome.RENEWED)

    def _take_from(self, peer: PeerId, data: bytes, age_s: float = 0.0) -> Outcome | None:
        """Take a record that a peer gave us; None when it is refused."""
        try:
            return self._take(data, age_s=age_s)
        except RemoteProtocolError as error:
            _log.warning("record.refused", giver=peer, reason=str(error))
            return None

    def _take(self, data: bytes, *, age_s: float = 0.0, own: bool = False) -> Outcome:
        outcome, (domain, signer) = self._view.accept(data, self._now(), age_s=age_s)
        mine = self._view.get(ADVERT, self._us)
        foreign = mine is not None and mine.version > (self._me.incarnation, self._me.sequence)
        if outcome is Outcome.CONFLICT or (foreign and outcome is not Outcome.OLD and signer == self._us):
            # Ours came from outside, newer than the one we wrote: somebody else holds our key.
            _log.error("record.contradicted", peer=signer, domain=domain)
            if self._health is not None:
                self._health.set("two-writers", peer=signer)
        if domain == HEAD and outcome is Outcome.CHANGED:
            self._store.put_record(HEAD, signer, data)
        if outcome in (Outcome.CHANGED, Outcome.CONFLICT) and not (own and domain == ADVERT):
            self._note_change()
        return outcome

    def _set_me(self, advert: Advert) -> None:
        if advert == self._me:
            return
        try:
            check_advert(advert, self._us)
        except RemoteProtocolError as error:
            raise LocalProtocolError(str(error)) from None
        encode(advert)  # raises for what the message can't hold
        self._me = advert
        self._dirty.set()
        self._note_change()

    def _note_change(self) -> None:
        self._lively = frozenset(self._view.alive(ADVERT, self._now()))
        self.changes.notify()

    def _now(self) -> float:
        return trio.current_time()

    # Anti-entropy

    async def _welcome(self, peer: PeerId) -> None:
        """Sync with a peer as soon as it has admitted us and we it."""
        pause, cap = RETRY_S
        with trio.move_on_after(GIVE_UP_S):
            while peer in self._host.peers and peer not in self._synced:
                if await self._ask(peer):
                    return
                await trio.sleep(pause)
                pause = min(cap, pause * 1.5)

    async def _ask_around(self, peer: PeerId) -> None:
        """A peer's connection went away: perhaps others still hear it."""
        await trio.sleep(ASK_AROUND_S)
        others = [other for other in self._host.peers if other in self._synced]
        if peer not in self._host.peers and others:
            await self._ask(self._rng.choice(others))

    async def _sync_forever(self) -> None:
        while True:
            await trio.sleep(SYNC_SECONDS * self._rng.uniform(0.8, 1.2))  # not all nodes at the same moment
            peers = self._host.peers
            if peers:
                await self._ask(self._rng.choice(peers))

    async def _ask(self, peer: PeerId) -> bool:
        """One exchange that we begin; whether it came to its end."""
        try:
            with trio.fail_after(TIMEOUT_S):
                stream = await self._host.open_stream(peer, PROTOCOL)
                try:
                    await self._exchange(stream, asking=True)
                finally:
                    await _close(stream)
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
        if self._streams.get(peer, 0) >= MAX_SYNCS:
            await stream.reset()
            return
        self._streams[peer] = self._streams.get(peer, 0) + 1
        try:
            with trio.fail_after(TIMEOUT_S):
                await self._exchange(stream, asking=False)
        except trio.TooSlowError:
            await stream.reset()
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _exchange(self, stream: Stream, *, asking: bool) -> None:
        """Run one side. Raises PeerUnreachable, or RemoteProtocolError when the peer breaks a rule."""
        machine = SyncMachine(self._view.versions(), self._view.lendable(self._now()), asking=asking)
        reader = FrameReader(max_header=MAX_MESSAGE, max_body=0)
        if asking:
            await self._perform(machine.begin(), stream)
        while not machine.done:
            data = await stream.receive_some()
            if not data:
                raise PeerUnreachable("The peer ended the exchange of records before its end.", peer=stream.peer)
            for frame in reader.feed(data):
                await self._perform(machine.handle(SYNC.decode(frame.header)), stream)

    async def _perform(self, effects: Sequence[Effect], stream: Stream) -> None:
        for effect in effects:
            match effect:
                case Send(message):
                    await stream.send_all(pack(SYNC.encode(message)))
                case Take(record, age_s):
                    self._take_from(stream.peer, record, age_s)
                    await trio.lowlevel.checkpoint()  # hundreds of signatures must not hold the loop
                case Finished(sent, taken):
                    self._synced.add(stream.peer)
                    _log.debug("sync.finished", peer=stream.peer, sent=sent, taken=taken)


def _fixed(advert: Advert) -> tuple[object, ...]:
    return advert.peer, advert.incarnation, advert.sequence, advert.issued_ms


async def _close(stream: Stream) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
        await stream.aclose()


def _fitting(advert: Advert) -> Advert:
    """The advert with as many holdings as a record takes; of very many files some can't be named."""
    while len(encode(advert)) > MAX_RECORD_BYTES - _ENVELOPE_BYTES:
        largest = max(advert.holdings, key=lambda holding: len(holding.cids))
        halved = Holding(manifest=largest.manifest, cids=largest.cids[: len(largest.cids) // 2])
        advert = replace(advert, holdings=tuple(halved if h is largest else h for h in advert.holdings))
    return advert
