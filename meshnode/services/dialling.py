"""Keeps connections up: to the seeds, to peers met before, to whoever the directory knows or is heard nearby.

A full mesh up to `MAX_PEERS`; beyond that every node keeps the peers that a hash of both ids picks for it, so that
the choices of all nodes together make a well-connected random graph. Where two nodes know each other, the one
with the smaller id dials at once and the other a little later, so that one connection is made and not two.

Who is away is dialled again and again, after pauses that begin anew when there is a reason to hope: this machine's
network has changed, it woke up, or one of those who were away is back. Links that die and return without a trace on
this machine give no such reason, so the pauses stay short while an outage lasts minutes: a dial of a dead address
costs a millisecond. They grow with the number of those who are away, and for each with the time for which it is.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.net.port import Host, PeerEvent
from meshnode.services.port import Adverts, Nearby
from meshnode.state.address_book import MAX_ADDRESSES, AddressBook
from protocols.backoff import Backoff
from protocols.ids import PeerId, short

MAX_PEERS: Final = 32  # connections that we look for; 500 pairs are still cheap to keep alive
MAX_RETRIES: Final = 8  # dials at the same time of peers that could not be reached before
YIELD_S: Final = 2.0  # head start of the smaller id
YIELD_REMEMBERED_S: Final = 0.25  # the same, for a peer that may have no idea where we are
STEADY_S: Final = 10.0  # a connection this old forgets earlier failures
RETRY_FIRST_S: Final = 0.5
RETRY_CAP_S: Final = 3.0  # TCP knocks at growing intervals: links may be back for another 3 s before it does
RETRY_SPREAD_S: Final = 0.3  # for each peer that is away: 100 of them are dialled three times a second, all together
AWAY_SHARE: Final = 1 / 400  # of the time for which a peer is away it is left alone: after half an hour 4.5 s
ALONE_CAP_S: Final = 10.0  # for everybody, while nobody is here
KNOWN_CAP_S: Final = 20.0  # for seeds, and for peers that others still hear
FORGOTTEN_CAP_S: Final = 200.0  # for peers that nobody advertises any more
RETURNED: Final = 2  # failures in a row, after which a connection is a reason to hope for others
ANEW_S: Final = 5.0  # between two such reasons

_log = get_logger("dialling")


@dataclass(slots=True)
class _Target:
    """One peer that we want to be connected to."""

    addresses: tuple[str, ...] = ()
    seed: bool = False  # it need not know us: we dial it, whoever has the smaller id
    advertised: bool = False  # its advert came to us, so ours came to it
    backoff: Backoff = field(default_factory=lambda: Backoff(RETRY_FIRST_S, RETRY_CAP_S))
    affinity: bytes = b""  # the smaller, the rather it is among those we keep
    away_since: float = 0.0  # seconds; while it is not connected
    due: float = 0.0  # next dial, seconds
    dial: trio.CancelScope | None = None  # the one that is under way
    connected_at: float | None = None
    answers: bool = False  # the last failure was a connection that did not last
    failure: str = ""


class DiallingService:
    """Dials until everybody is connected who should be."""

    name = "dialling"

    def __init__(
        self,
        host: Host,
        book: AddressBook,
        directory: Adverts,
        health: Health,
        rng: random.Random,
        nearby: Nearby | None = None,
    ) -> None:
        """
        Args:
          book: names seeds and peers that were met; addresses that worked are added.
          directory: says where members listen.
          rng: spreads the retries.
          nearby: finds members on the local network; None: nobody does.
        """
        self._host = host
        self._book = book
        self._directory = directory
        self._health = health
        self._rng = rng
        self._nearby = nearby
        self._targets: dict[PeerId, _Target] = {}
        self._advertised: dict[PeerId, tuple[str, ...]] = {}
        self._anew_at = -math.inf
        self._woken = trio.Event()

    def failures(self) -> dict[str, str]:
        """Why there is no connection, in a sentence, by peer id (or by address, where that is what is wrong)."""
        out = dict(self._book.wrong)
        connected = set(self._host.peers)
        for peer, target in self._targets.items():
            if target.failure and peer not in connected:
                out[peer] = target.failure
        return out

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look and dial until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_connections)
            nursery.start_soon(self._follow_adverts)
            nursery.start_soon(self._follow_surroundings)
            if self._nearby is not None:
                nursery.start_soon(self._follow_nearby, self._nearby)
            task_status.started()
            while True:
                self._woken = trio.Event()
                self._look()
                self._report()
                for peer in self._due():
                    self._targets[peer].dial = trio.CancelScope()
                    nursery.start_soon(self._dial, self._targets[peer], peer)
                with trio.move_on_at(self._next_due()):
                    await self._woken.wait()

    async def _follow_connections(self) -> None:
        async for event in self._host.events():
            self._connection(event)
            self._woken.set()

    async def _follow_adverts(self) -> None:
        while True:
            version = self._directory.changes.version
            adverts = self._directory.live().items()
            advertised = {peer: advert.addresses for peer, advert in adverts if peer != self._host.peer_id}
            if advertised != self._advertised:
                self._advertised = advertised
                self._woken.set()
            await self._directory.changes.wait(version)

    async def _follow_surroundings(self) -> None:
        version = self._host.surroundings.version
        while True:
            version = await self._host.surroundings.wait(version)
            for target in self._targets.values():
                if target.dial is not None:
                    target.dial.cancel()  # it may knock with an address that we don't have any more
            self._begin_anew()
            self._woken.set()

    async def _follow_nearby(self, nearby: Nearby) -> None:
        version = nearby.changes.version
        while True:
            version = await nearby.changes.wait(version)
            self._woken.set()

    def _begin_anew(self) -> None:
        """There is a reason to hope: earlier failures don't count, but those of peers who answer and hang up."""
        now = self._anew_at = trio.current_time()
        for peer, target in self._targets.items():
            if target.connected_at is None and not target.answers:
                target.backoff.reset()
                target.due = min(target.due, now + self._head_start(peer, target))

    def _report(self) -> None:
        """Nobody is here: somebody should look, unless nobody else has ever been here."""
        alone = not self._host.peers
        if alone and self._targets:
            self._health.set("no-peers", addresses=", ".join(self._host.addresses))
        else:
            self._health.clear("no-peers")
        if alone and not self._targets:
            self._health.set("first-node")
        else:
            self._health.clear("first-node")

    def _connection(self, event: PeerEvent) -> None:
        now = trio.current_time()
        target = self._targets.get(event.peer)
        if target is None:
            return
        if event.connected:
            target.connected_at = now
            target.failure = ""
            if target.backoff.failures >= RETURNED and now - self._anew_at >= ANEW_S:
                self._begin_anew()
            return
        steady = target.connected_at is not None and now - target.connected_at >= STEADY_S
        target.connected_at, target.away_since = None, now
        target.failure = f"{short(event.peer)} left: {event.reason or 'the connection was closed'}"
        if steady:
            target.answers = False
            target.backoff.reset()
            target.due = now + self._head_start(event.peer, target)
        else:
            # A connection that does not last (a refusal, say) is a failed attempt, however well the dial went.
            self._postpone(target, now, answers=True)

    def _look(self) -> None:
        """Bring the targets up to date. A new address is tried at once, whatever happened before."""
        found: dict[PeerId, Sequence[str]] = dict(self._book.known())
        nearby = {} if self._nearby is None else self._nearby.found()
        for source in (self._advertised, nearby):
            for peer, addresses in source.items():
                found[peer] = [*addresses, *found.get(peer, ())]  # the newest first
        found.pop(self._host.peer_id, None)
        now = trio.current_time()
        for peer, addresses in found.items():
            unique = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]
            target = self._targets.get(peer)
            if target is None:
                target = self._targets[peer] = _Target(
                    seed=peer in self._book.seeds,
                    advertised=peer in self._advertised,
                    affinity=self._affinity(peer),
                    away_since=now,
                )
                target.due = now + self._head_start(peer, target)
                if peer in self._host.peers:
                    target.connected_at = now
            elif set(unique) - set(target.addresses):
                target.due = min(target.due, now + self._head_start(peer, target))
                if target.dial is not None:
                    target.dial.cancel()
            target.addresses = unique
            target.advertised = peer in self._advertised
        for peer in self._host.peers:
            self._book.says(peer, self._advertised.get(peer, ()))
        for peer in [peer for peer in self._targets if peer not in found and self._targets[peer].dial is None]:
            del self._targets[peer]

    def _head_start(self, peer: PeerId, target: _Target) -> float:
        if target.seed or self._host.peer_id < peer:
            return 0.0
        return YIELD_S if target.advertised else YIELD_REMEMBERED_S

    def _due(self) -> list[PeerId]:
        """Peers to dial now: seeds always, others while there is room in the mesh; who failed waits its turn."""
        now = trio.current_time()
        connected = set(self._host.peers)
        busy = [target for target in self._targets.values() if target.dial is not None]
        room = MAX_PEERS - len(connected) - len(busy)
        retries = MAX_RETRIES - sum(target.backoff.failures > 0 for target in busy)
        waiting = [
            peer
            for peer, target in self._targets.items()
            if peer not in connected and target.dial is None and target.due <= now and target.addresses
        ]
        out = []
        for peer in sorted(waiting, key=self._order):
            target = self._targets[peer]
            if (room <= 0 and not target.seed) or (target.backoff.failures and retries <= 0):
                continue
            room -= 1
            retries -= target.backoff.failures > 0
            out.append(peer)
        return out

    def _order(self, peer: PeerId) -> tuple[float, bool, bytes]:
        """Who has not failed comes first, seeds and then by affinity; then who waits for longest."""
        target = self._targets[peer]
        return target.due if target.backoff.failures else -math.inf, not target.seed, target.affinity

    def _next_due(self) -> float:
        """When somebody is to be dialled who was not to be by now: who then finds no room waits for a change."""
        now, connected = trio.current_time(), set(self._host.peers)
        dues = (target.due for peer, target in self._targets.items() if target.due > now and peer not in connected)
        return min(dues, default=math.inf)

    def _affinity(self, peer: PeerId) -> bytes:
        pair = "".join(sorted((self._host.peer_id, peer)))
        return hashlib.sha256(pair.encode()).digest()

    async def _dial(self, target: _Target, peer: PeerId) -> None:
        addresses, dial = target.addresses, target.dial
        assert dial is not None, "the one who starts this makes it"
        try:
            with dial:
                await self._host.connect(peer, addresses)
        except (PeerUnreachable, Declined) as error:
            target.failure = str(error)
            self._postpone(target, trio.current_time())
            _log.debug("peer.unreachable", peer=peer, reason=str(error), failures=target.backoff.failures)
        else:
            if peer in self._host.peers:
                self._book.answered(peer, addresses)
            elif not dial.cancelled_caught:
                # It went away before we looked; without this it would be dialled in a tight loop.
                self._postpone(target, trio.current_time(), answers=True)
        finally:
            target.dial = None
            self._woken.set()

    def _postpone(self, target: _Target, now: float, *, answers: bool = False) -> None:
        target.answers = answers
        target.backoff.cap = self._cap(target, now)
        target.due = now + target.backoff.next(self._rng.random())

    def _cap(self, target: _Target, now: float) -> float:
        """The longest pause between two dials of a peer that is away, before it is spread; seconds."""
        away = len(self._targets.keys() - set(self._host.peers))
        least = KNOWN_CAP_S if target.answers else max(RETRY_CAP_S, RETRY_SPREAD_S * away)
        if not self._host.peers:
            most = ALONE_CAP_S
        else:
            most = KNOWN_CAP_S if target.seed or target.advertised else FORGOTTEN_CAP_S
        return max(least, min(most, (now - target.away_since) * AWAY_SHARE))
