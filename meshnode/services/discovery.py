"""Keeps connections up: to the seeds, to peers met before, to whoever the directory knows.

A full mesh up to `MAX_PEERS`; beyond that every node keeps the peers that a hash of both ids picks for it, so that
the choices of all nodes together make a well-connected random graph. Where two nodes know each other, the one
with the smaller id dials at once and the other a little later, so that one connection is made and not two.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.net.port import Host, PeerEvent
from meshnode.state.port import Peers
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership.ticket import peer_of

MAX_PEERS: Final = 32  # connections that we look for; 500 pairs are still cheap to keep alive
MAX_RETRIES: Final = 8  # dials at the same time of peers that could not be reached before
LOOK_SECONDS: Final = 0.2  # how often new addresses are looked for
YIELD_SECONDS: Final = 2.0  # head start of the smaller id
YIELD_REMEMBERED_SECONDS: Final = 0.25  # the same, for a peer that may have no idea where we are
STEADY_SECONDS: Final = 10.0  # a connection this old forgets earlier failures
BACKOFF_FIRST: Final = 0.5  # seconds; doubles with every failure
BACKOFF_CAP: Final = 30.0
REMEMBERED_CAP: Final = 300.0  # for peers that nobody speaks of any more
MAX_ADDRESSES: Final = 16  # tried for one peer

_log = get_logger("discovery")

Known = Callable[[], Mapping[PeerId, Sequence[str]]]


@dataclass(slots=True)
class _Target:
    """One peer that we want to be connected to."""

    addresses: tuple[str, ...] = ()
    seed: bool = False  # it need not know us: we dial it, whoever has the smaller id
    spoken_of: bool = False  # its advert came to us, so ours came to it
    cap: float = BACKOFF_CAP
    due: float = 0.0  # next dial, seconds
    failures: int = 0
    dialling: bool = False
    connected_at: float | None = None
    failure: str = field(default="")


class DiscoveryService:
    """Dials until everybody is connected who should be."""

    name = "discovery"

    def __init__(
        self, host: Host, peers: Peers, seeds: Sequence[str], known: Known, rng: random.Random, clock: Wall
    ) -> None:
        """
        Args:
          peers: where peers were met before; addresses that worked are added.
          seeds: multiaddrs of bootstrap peers and of the ticket, with /p2p/<peer id>.
          known: addresses of members by peer (adverts); called often, must be quick.
          rng: spreads the retries.
        """
        self._host = host
        self._peers = peers
        self._seeds = tuple(seeds)
        self._known = known
        self._rng = rng
        self._clock = clock
        self._targets: dict[PeerId, _Target] = {}
        self._remembered: Mapping[PeerId, Sequence[str]] = {}
        self._kept: dict[PeerId, tuple[str, ...]] = {}  # what was remembered in this run
        self._bad_addresses: dict[str, str] = {}
        self._woken = trio.Event()

    def wake(self) -> None:
        """Something has changed: look for addresses now."""
        self._woken.set()

    def failures(self) -> dict[str, str]:
        """Why there is no connection, in a sentence, by peer id (or by address, where that is what is wrong)."""
        out = dict(self._bad_addresses)
        connected = set(self._host.peers)
        for peer, target in self._targets.items():
            if target.failure and peer not in connected:
                out[peer] = target.failure
        return out

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look and dial until cancelled."""
        self._remembered = self._peers.known_peers()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            task_status.started()
            while True:
                self._look()
                for peer in self._due():
                    self._targets[peer].dialling = True
                    nursery.start_soon(self._dial, peer)
                self._woken = trio.Event()
                with trio.move_on_after(self._pause()):
                    await self._woken.wait()

    async def _watch(self) -> None:
        async for event in self._host.events():
            self._connection(event)
            self.wake()

    def _connection(self, event: PeerEvent) -> None:
        now = trio.current_time()
        target = self._targets.get(event.peer)
        if target is None:
            return
        if event.connected:
            target.connected_at = now
            target.failure = ""
            return
        steady = target.connected_at is not None and now - target.connected_at >= STEADY_SECONDS
        target.connected_at = None
        target.failure = f"{short(event.peer)} left: {event.reason or 'the connection was closed'}"
        if steady:
            target.failures = 0
            target.due = now + self._head_start(event.peer, target)
        else:
            # A connection that does not last (a refusal, say) is a failed attempt, however well the dial went.
            self._postpone(target, now)

    def _look(self) -> None:
        """Bring the targets up to date. A new address is tried at once, whatever happened before."""
        found: dict[PeerId, list[str]] = {}
        for address in self._seeds:
            try:
                found.setdefault(peer_of(address), []).append(address)
            except RemoteProtocolError as error:
                self._bad_addresses[address] = str(error)
        seeds = set(found)
        spoken_of = self._known()
        for source in (spoken_of, self._remembered):
            for peer, addresses in source.items():
                found.setdefault(peer, []).extend(addresses)
        found.pop(self._host.peer_id, None)
        now = trio.current_time()
        for peer, addresses in found.items():
            unique = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]
            target = self._targets.get(peer)
            if target is None:
                target = self._targets[peer] = _Target(seed=peer in seeds, spoken_of=peer in spoken_of)
                target.due = now + self._head_start(peer, target)
                if peer in self._host.peers:
                    target.connected_at = now
            elif set(unique) - set(target.addresses):
                target.due = min(target.due, now + self._head_start(peer, target))
            target.addresses = unique
            target.spoken_of = peer in spoken_of
            target.cap = BACKOFF_CAP if target.seed or target.spoken_of else REMEMBERED_CAP
        self._remember(spoken_of)
        for peer in [peer for peer in self._targets if peer not in found and not self._targets[peer].dialling]:
            del self._targets[peer]

    def _remember(self, spoken_of: Mapping[PeerId, Sequence[str]]) -> None:
        """Keep where connected members say they are: after a restart we must find those that once found us."""
        for peer in self._host.peers:
            addresses = tuple(spoken_of.get(peer, ()))[:MAX_ADDRESSES]
            if addresses and self._kept.get(peer) != addresses:
                self._peers.remember_peer(peer, addresses, self._clock())
                self._kept[peer] = addresses

    def _head_start(self, peer: PeerId, target: _Target) -> float:
        if target.seed or self._host.peer_id < peer:
            return 0.0
        return YIELD_SECONDS if target.spoken_of else YIELD_REMEMBERED_SECONDS

    def _due(self) -> list[PeerId]:
        """Peers to dial now: seeds always, others while there is room in the mesh."""
        now = trio.current_time()
        connected = set(self._host.peers)
        busy = [target for target in self._targets.values() if target.dialling]
        room = MAX_PEERS - len(connected) - len(busy)
        retries = MAX_RETRIES - sum(target.failures > 0 for target in busy)
        out = []
        for peer in sorted(self._targets, key=lambda peer: (not self._targets[peer].seed, self._affinity(peer))):
            target = self._targets[peer]
            if peer in connected or target.dialling or target.due > now or not target.addresses:
                continue
            if (room <= 0 and not target.seed) or (target.failures and retries <= 0):
                continue
            room -= 1
            retries -= target.failures > 0
            out.append(peer)
        return out

    def _pause(self) -> float:
        """Seconds until there may be something to do."""
        now = trio.current_time()
        dues = (target.due - now for target in self._targets.values() if target.due > now)
        return min(LOOK_SECONDS, min(dues, default=LOOK_SECONDS))

    def _affinity(self, peer: PeerId) -> bytes:
        pair = "".join(sorted((self._host.peer_id, peer)))
        return hashlib.sha256(pair.encode()).digest()

    async def _dial(self, peer: PeerId) -> None:
        target = self._targets[peer]
        addresses = target.addresses
        try:
            await self._host.connect(peer, addresses)
        except (PeerUnreachable, Declined) as error:
            target.failure = str(error)
            self._postpone(target, trio.current_time())
            _log.debug("peer.unreachable", peer=peer, reason=str(error), failures=target.failures)
            if set(target.addresses) - set(addresses):
                target.due = trio.current_time()  # another address became known while these were tried
        else:
            self._peers.remember_peer(peer, addresses, self._clock())
            if peer not in self._host.peers:
                # It went away before we looked; without this it would be dialled in a tight loop.
                self._postpone(target, trio.current_time())
        finally:
            target.dialling = False

    def _postpone(self, target: _Target, now: float) -> None:
        pause = min(target.cap, BACKOFF_FIRST * 2.0 ** min(target.failures, 16))
        target.failures += 1
        target.due = now + pause * self._rng.uniform(0.5, 1.0)
