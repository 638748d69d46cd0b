"""Keeps connections up: to the seeds, to peers met before, to whoever the directory knows.

A full mesh up to `MAX_PEERS`; beyond that every node keeps the peers that a hash of both ids picks for it, so that
the choices of all nodes together make a well-connected random graph. Where two nodes know each other, the one
with the smaller id dials at once and the other a little later, so that one connection is made and not two.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.net.port import Host, PeerEvent
from meshnode.services.port import Adverts
from meshnode.state.port import Peers
from protocols.backoff import Backoff
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership.ticket import peer_of

MAX_PEERS: Final = 32  # connections that we look for; 500 pairs are still cheap to keep alive
MAX_RETRIES: Final = 8  # dials at the same time of peers that could not be reached before
YIELD_S: Final = 2.0  # head start of the smaller id
YIELD_REMEMBERED_S: Final = 0.25  # the same, for a peer that may have no idea where we are
STEADY_S: Final = 10.0  # a connection this old forgets earlier failures
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_CAP_S: Final = 20.0
REMEMBERED_CAP_S: Final = 200.0  # for peers that nobody advertises any more
MAX_ADDRESSES: Final = 16  # tried for one peer

_log = get_logger("discovery")


@dataclass(slots=True)
class _Target:
    """One peer that we want to be connected to."""

    addresses: tuple[str, ...] = ()
    seed: bool = False  # it need not know us: we dial it, whoever has the smaller id
    advertised: bool = False  # its advert came to us, so ours came to it
    backoff: Backoff = field(default_factory=lambda: Backoff(BACKOFF_FIRST_S, BACKOFF_CAP_S))
    due: float = 0.0  # next dial, seconds
    dialling: bool = False
    connected_at: float | None = None
    failure: str = ""


class DiscoveryService:
    """Dials until everybody is connected who should be."""

    name = "discovery"

    def __init__(
        self,
        host: Host,
        peers: Peers,
        directory: Adverts,
        seeds: Sequence[str],
        health: Health,
        rng: random.Random,
        wall: Wall,
    ) -> None:
        """
        Args:
          peers: where peers were met before; addresses that worked are added.
          directory: says where members listen.
          seeds: multiaddrs of bootstrap peers and of the ticket, with /p2p/<peer id>.
          rng: spreads the retries.
        """
        self._host = host
        self._peers = peers
        self._directory = directory
        self._seeds = tuple(seeds)
        self._health = health
        self._rng = rng
        self._wall = wall
        self._targets: dict[PeerId, _Target] = {}
        self._remembered: Mapping[PeerId, Sequence[str]] = {}
        self._kept: dict[PeerId, tuple[str, ...]] = {}  # what was remembered in this run
        self._bad_addresses: dict[str, str] = {}
        self._advertised: dict[PeerId, tuple[str, ...]] = {}
        self._woken = trio.Event()

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
            nursery.start_soon(self._follow_connections)
            nursery.start_soon(self._follow_adverts)
            task_status.started()
            while True:
                self._woken = trio.Event()
                self._look()
                self._report()
                for peer in self._due():
                    self._targets[peer].dialling = True
                    nursery.start_soon(self._dial, peer)
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
            return
        steady = target.connected_at is not None and now - target.connected_at >= STEADY_S
        target.connected_at = None
        target.failure = f"{short(event.peer)} left: {event.reason or 'the connection was closed'}"
        if steady:
            target.backoff.reset()
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
        for source in (self._advertised, self._remembered):
            for peer, addresses in source.items():
                found.setdefault(peer, []).extend(addresses)
        found.pop(self._host.peer_id, None)
        now = trio.current_time()
        for peer, addresses in found.items():
            unique = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]
            target = self._targets.get(peer)
            if target is None:
                target = self._targets[peer] = _Target(seed=peer in seeds, advertised=peer in self._advertised)
                target.due = now + self._head_start(peer, target)
                if peer in self._host.peers:
                    target.connected_at = now
            elif set(unique) - set(target.addresses):
                target.due = min(target.due, now + self._head_start(peer, target))
            target.addresses = unique
            target.advertised = peer in self._advertised
            target.backoff.cap = BACKOFF_CAP_S if target.seed or target.advertised else REMEMBERED_CAP_S
        self._remember()
        for peer in [peer for peer in self._targets if peer not in found and not self._targets[peer].dialling]:
            del self._targets[peer]

    def _remember(self) -> None:
        """Keep where connected members say they are: after a restart we must find those that once found us."""
        for peer in self._host.peers:
            addresses = self._advertised.get(peer, ())[:MAX_ADDRESSES]
            if addresses and self._kept.get(peer) != addresses:
                self._peers.remember_peer(peer, addresses, self._wall())
                self._kept[peer] = addresses

    def _head_start(self, peer: PeerId, target: _Target) -> float:
        if target.seed or self._host.peer_id < peer:
            return 0.0
        return YIELD_S if target.advertised else YIELD_REMEMBERED_S

    def _due(self) -> list[PeerId]:
        """Peers to dial now: seeds always, others while there is room in the mesh."""
        now = trio.current_time()
        connected = set(self._host.peers)
        busy = [target for target in self._targets.values() if target.dialling]
        room = MAX_PEERS - len(connected) - len(busy)
        retries = MAX_RETRIES - sum(target.backoff.failures > 0 for target in busy)
        out = []
        for peer in sorted(self._targets, key=lambda peer: (not self._targets[peer].seed, self._affinity(peer))):
            target = self._targets[peer]
            if peer in connected or target.dialling or target.due > now or not target.addresses:
                continue
            if (room <= 0 and not target.seed) or (target.backoff.failures and retries <= 0):
                continue
            room -= 1
            retries -= target.backoff.failures > 0
            out.append(peer)
        return out

    def _next_due(self) -> float:
        """When somebody is to be dialled who was not to be by now: who then finds no room waits for a change."""
        now, connected = trio.current_time(), set(self._host.peers)
        dues = (target.due for peer, target in self._targets.items() if target.due > now and peer not in connected)
        return min(dues, default=math.inf)

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
            _log.debug("peer.unreachable", peer=peer, reason=str(error), failures=target.backoff.failures)
            if set(target.addresses) - set(addresses):
                target.due = trio.current_time()  # another address became known while these were tried
        else:
            self._peers.remember_peer(peer, addresses, self._wall())
            if peer not in self._host.peers:
                # It went away before we looked; without this it would be dialled in a tight loop.
                self._postpone(target, trio.current_time())
        finally:
            target.dialling = False
            self._woken.set()

    def _postpone(self, target: _Target, now: float) -> None:
        target.due = now + target.backoff.next(self._rng.random())
