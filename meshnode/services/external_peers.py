"""Peers outside the network: who is kept connected, for which reasons, and with which protocols.

A host's guests. Each has one reason or several, and stays as long as one of them holds:

    configured   the owner's settings name it (`content.ipfs_peers`, or the daemon of `content.ipfs_api`): it is
                 dialled until it is connected, and again when it went away
    used         we ask it something: DHT peers, providers that blocks are fetched from
    came         it connected by itself, and everybody may have our blocks (`content.share`)

Everything but the first is bounded, for those peers are named by strangers, or are strangers. Nothing here leads from
one to another. Members of our network never come here: as a guest, a member would lose its place in the network, so
callers leave them out.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import trio

from meshnode.core.clock import Wall, wall_ms
from meshnode.core.errors import PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.net.port import Host, PeerEvent
from protocols.backoff import Backoff
from protocols.ids import PeerId, short

MAX_USED: Final = 32  # peers that we use at the same time; further ones wait
MAX_CAME: Final = 32  # peers that came by themselves; the next one takes the place of the oldest
MAX_LINGERING: Final = 16  # peers that nobody uses any more and that are still connected, for the next question
LINGER_S: Final = 15.0
FIRST_PAUSE_S: Final = 0.5  # between dials of a configured peer
LAST_PAUSE_S: Final = 30.0
STEADY_S: Final = 10.0  # a connection this old forgets earlier failures
UNUSED: Final = "there is nothing more to ask"

_log = get_logger("external-peers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalSettings:
    """What the owner's configuration says about peers outside the network."""

    addresses: tuple[str, ...] = ()  # multiaddrs with /p2p/<peer id>; several of one peer are tried in turn
    protocols: tuple[str, ...] = ()  # what configured peers may use
    offers: tuple[str, ...] = ()  # what everybody may use; empty: nobody who comes is taken in
    entrance: str = ""  # what those who came may use, too: whoever brings a ticket joins by it, on this connection


class _Configured:
    """A peer that settings name, and how it is reached."""

    def __init__(self) -> None:
        self.addresses: dict[str, tuple[str, ...]] = {}  # by setting
        self.failure = ""
        self.away_since_ms = 0  # UTC milliseconds; 0: it is not
        self.scope: trio.CancelScope | None = None  # of the task that dials it

    def all_addresses(self) -> list[str]:
        return list(dict.fromkeys(address for some in self.addresses.values() for address in some))


@dataclass(slots=True)
class _Reasons:
    """Why one peer is kept."""

    configured: _Configured | None = None
    used: list[frozenset[str]] = field(default_factory=list)  # what each of its users lets it use
    came: bool = False

    def __bool__(self) -> bool:
        return self.configured is not None or bool(self.used) or self.came


class ExternalPeers:
    """Makes peers guests of the host, dials configured ones, and dismisses those for whom there is no reason left."""

    name = "external-peers"

    def __init__(
        self,
        host: Host,
        settings: ExternalSettings,
        rng: random.Random,
        *,
        health: Health | None = None,
        wall: Wall = wall_ms,
    ) -> None:
        """Welcomes the configured peers at the host. `rng` spreads the dials."""
        self._host = host
        self._settings = settings
        self._rng = rng
        self._health = Health() if health is None else health
        self._wall = wall
        self._offers = frozenset(settings.offers)
        self._reasons: dict[PeerId, _Reasons] = {}  # in the order of their first reason
        self._leaving: dict[PeerId, tuple[float, str]] = {}  # when each is dismissed, and why; the next one first
        self._came: dict[PeerId, None] = {}  # oldest first
        self._places = trio.CapacityLimiter(MAX_USED)
        self._changes = Changes()  # of all of these
        for address in settings.addresses:
            # An older IPFS node has an RSA key, so that this need not be the id of an Ed25519 key.
            peer = PeerId(address.rpartition("/p2p/")[2])
            known = self._reasons.get(peer)
            before = known.configured.all_addresses() if known is not None and known.configured is not None else ()
            self.configure(peer, (*before, address), "content.ipfs_peers")

    # What others read

    @property
    def configured(self) -> tuple[PeerId, ...]:
        """Peers that a setting names, connected or not, in that order."""
        return tuple(peer for peer, reasons in self._reasons.items() if reasons.configured is not None)

    @property
    def came(self) -> tuple[PeerId, ...]:
        """Those that are here by themselves, oldest first."""
        return tuple(self._came)

    def failures(self) -> dict[PeerId, str]:
        """Why a configured peer is not connected, in a sentence."""
        return {
            peer: reasons.configured.failure
            for peer, reasons in self._reasons.items()
            if reasons.configured is not None and reasons.configured.failure and peer not in self._host.guests
        }

    # Reasons

    def configure(self, peer: PeerId, addresses: Sequence[str], setting: str) -> None:
        """Keep a peer connected because `setting` names it, or learn where it is found now.

        What other settings say about it stays.
        """
        reasons = self._reasons.setdefault(peer, _Reasons())
        if reasons.configured is None:
            reasons.configured = _Configured()
        reasons.configured.addresses[setting] = tuple(addresses)
        self._grant(peer)

    def release(self, peer: PeerId, setting: str, reason: str) -> None:
        """`setting` does not name it any more; its connections are closed unless there is another reason."""
        kept = self._reasons.get(peer)
        if kept is None or kept.configured is None or kept.configured.addresses.pop(setting, None) is None:
            return
        if kept.configured.addresses:
            return
        if kept.configured.scope is not None:
            kept.configured.scope.cancel()
        kept.configured = None
        self._health.clear("guest-unreachable", guest=short(peer))
        self._drop(peer, reason)

    @asynccontextmanager
    async def use(
        self, peer: PeerId, addresses: Sequence[str], protocols: Sequence[str] = ()
    ) -> AsyncGenerator[None, None]:
        """Be connected to a peer, which is no member and may use these protocols meanwhile.

        It lingers a little afterwards, for the next question. Waits while MAX_USED others are used.

        Raises PeerUnreachable. If cancelled: the peer is let go.
        """
        token = object()
        await self._places.acquire_on_behalf_of(token)
        try:
            self.take_in(peer)  # whoever came by itself stays when we have no more questions
            grant = frozenset(protocols)
            self._reasons.setdefault(peer, _Reasons()).used.append(grant)
            self._grant(peer)
            reached = False
            try:
                await self._host.connect(peer, addresses)
                reached = True
                yield
            finally:
                self._reasons[peer].used.remove(grant)
                self._drop(peer, UNUSED, linger=reached)
        finally:
            self._places.release_on_behalf_of(token)

    def take_in(self, peer: PeerId) -> bool:
        """Let a connected peer stay that does not speak our hello at all. Whether it may."""
        if not self._offers or peer not in self._host.peers or peer in self._reasons:
            return False
        self._reasons[peer] = _Reasons(came=True)
        self._came[peer] = None
        self._grant(peer)
        _log.info("peer.came", peer=peer, here=len(self._came))
        if len(self._came) > MAX_CAME:
            self._forget_came(next(iter(self._came)))
        return True

    def _forget_came(self, peer: PeerId) -> None:
        del self._came[peer]
        self._reasons[peer].came = False
        self._drop(peer, UNUSED)

    def _grant(self, peer: PeerId) -> None:
        """Tell the host what the peer may use now: the sum of its reasons."""
        reasons = self._reasons[peer]
        protocols = self._offers.union(*reasons.used)
        if reasons.configured is not None:
            protocols = protocols.union(self._settings.protocols)
        if reasons.came and self._settings.entrance:
            protocols |= {self._settings.entrance}
        self._leaving.pop(peer, None)
        self._host.welcome(peer, sorted(protocols))
        self._changes.notify()

    def _drop(self, peer: PeerId, why: str, *, linger: bool = False) -> None:
        """A reason is gone; without another one the peer leaves, now or when it has lingered."""
        self._grant(peer)
        if self._reasons[peer]:
            return
        del self._reasons[peer]
        now = trio.current_time()
        if not linger:
            self._leaving = {peer: (now, why), **self._leaving}
            return
        self._leaving[peer] = (now + LINGER_S, why)
        if len(self._leaving) > MAX_LINGERING:
            self._leave_now(next(iter(self._leaving)))

    def _leave_now(self, peer: PeerId) -> None:
        self._leaving[peer] = (trio.current_time(), self._leaving[peer][1])
        self._changes.notify()

    # The service

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dial configured peers, dismiss those for whom there is no reason, until cancelled."""
        for reasons in self._reasons.values():
            if reasons.configured is not None:
                reasons.configured.scope = None  # of an earlier run
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow, self._host.guest_events())
            task_status.started()
            while True:
                version = self._changes.version
                for peer, reasons in self._reasons.items():
                    if reasons.configured is not None and reasons.configured.scope is None:
                        reasons.configured.scope = trio.CancelScope()
                        nursery.start_soon(self._keep, peer, reasons.configured, reasons.configured.scope)
                now = trio.current_time()
                for peer, (when, why) in list(self._leaving.items()):
                    if when <= now:
                        del self._leaving[peer]
                        nursery.start_soon(self._dismiss, peer, why)
                with trio.move_on_at(min((when for when, _ in self._leaving.values()), default=math.inf)):
                    await self._changes.wait(version)

    async def _dismiss(self, peer: PeerId, why: str) -> None:
        if peer not in self._reasons:  # nobody has come to want it meanwhile
            await self._host.dismiss(peer, why)

    async def _follow(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async for event in events:
            if event.connected:
                continue
            if event.peer in self._came:
                # Even if it is back already: it may have joined meanwhile, and is to be looked at anew.
                self._forget_came(event.peer)
            elif event.peer in self._leaving and event.peer not in self._host.guests:
                self._leave_now(event.peer)

    # Configured peers

    async def _keep(self, peer: PeerId, configured: _Configured, scope: trio.CancelScope) -> None:
        backoff = Backoff(FIRST_PAUSE_S, LAST_PAUSE_S)
        with scope, self._host.guest_events() as events:
            while True:
                try:
                    await self._host.connect(peer, configured.all_addresses())
                except PeerUnreachable as error:
                    self._away(peer, configured, str(error).removeprefix(f"{peer} can't be reached: "))
                    _log.debug("peer.unreachable", peer=peer, reason=str(error), failures=backoff.failures)
                else:
                    if await self._stay(peer, configured, events) >= STEADY_S:
                        backoff.reset()
                with trio.move_on_after(backoff.next(self._rng.random())):  # unless it comes by itself
                    while peer not in self._host.guests:
                        await events.receive()

    async def _stay(
        self, peer: PeerId, configured: _Configured, events: trio.MemoryReceiveChannel[PeerEvent]
    ) -> float:
        """Wait until a connected peer leaves; how long it was there, in seconds."""
        began = trio.current_time()
        configured.away_since_ms = 0
        self._health.clear("guest-unreachable", guest=short(peer))
        _log.info("peer.connected", peer=peer)
        reason = ""
        while peer in self._host.guests:
            event = await events.receive()
            if event.peer == peer and not event.connected:
                reason = event.reason
        self._away(peer, configured, f"it left: {reason or 'the connection was closed'}")
        _log.info("peer.left", peer=peer, reason=reason)
        return trio.current_time() - began

    def _away(self, peer: PeerId, configured: _Configured, reason: str) -> None:
        configured.failure = f"{short(peer)} can't be reached: {reason}"
        configured.away_since_ms = configured.away_since_ms or self._wall()
        since = datetime.fromtimestamp(configured.away_since_ms / 1000, UTC)
        addresses = [address.partition("/p2p/")[0] for address in configured.all_addresses()]
        self._health.set(
            "guest-unreachable",
            guest=short(peer),
            addresses=", ".join(addresses) or "no address is known",
            since=f"{since:%Y-%m-%d %H:%M} UTC",
            reason=reason,
            setting=next(iter(configured.addresses), ""),
        )
