"""Guests for a while: DHT peers that are asked, providers that blocks are fetched from, strangers who come for ours.

Each visit is somebody's wish: as long as one of them holds a peer, it is a guest with what they grant; afterwards
its connection lingers a little, for the next question, and is closed. Everything is bounded, for the peers are
named by strangers, or are strangers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshnode.core.log import get_logger
from meshnode.net.port import Host, PeerEvent
from protocols.ids import PeerId

MAX_VISITS: Final = 32  # peers that we visit at once; further ones wait
MAX_LINGERING: Final = 16
LINGER_SECONDS: Final = 15.0
MAX_VISITORS: Final = 32  # strangers that came by themselves; the next one takes the place of the oldest

_log = get_logger("visits")


class Visits:
    """Makes peers guests, keeps count of why, and dismisses them."""

    name = "visits"

    def __init__(
        self,
        host: Host,
        is_member: Callable[[PeerId], bool],
        is_guest: Callable[[PeerId], bool],
        offers: Sequence[str] = (),
        *,
        entrance: str = "",
    ) -> None:
        """
        Args:
          is_member: of our network; never made a guest here, and none any more once it has become one.
          is_guest: by the configuration, and so not ours to make one or to dismiss.
          offers: protocols that everybody may use; empty: strangers are not taken in.
          entrance: a protocol that those who came by themselves may use, too: whoever brings a ticket does not
            speak it before it has joined. A peer that we visit must not: its hello would end in a refusal.
        """
        self._host = host
        self._is_member = is_member
        self._is_guest = is_guest
        self._offers = frozenset(offers)
        self._entrance = frozenset((entrance,) if entrance else ())
        self._grants: dict[PeerId, list[frozenset[str]]] = {}
        self._lingering: dict[PeerId, float] = {}  # since when, oldest first
        self._lingers = trio.Event()  # somebody does
        self._visitors: dict[PeerId, frozenset[str]] = {}  # their grants, oldest first
        self._places = trio.CapacityLimiter(MAX_VISITS)
        self._nursery: trio.Nursery | None = None

    @property
    def visitors(self) -> tuple[PeerId, ...]:
        """Strangers that are taken in now, oldest first."""
        return tuple(self._visitors)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dismiss those whom nobody needs, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._follow, self._host.guest_events())
            task_status.started()
            try:
                while True:
                    await self._wait_for_lingering()
                    self._dismiss(next(iter(self._lingering)))
            finally:
                self._nursery = None

    async def _wait_for_lingering(self) -> None:
        """Until the one that lingers longest has done so for long enough."""
        while True:
            since = next(iter(self._lingering.values()), None)
            if since is None:
                self._lingers = trio.Event()
                await self._lingers.wait()
            elif trio.current_time() >= since + LINGER_SECONDS:
                return
            else:
                await trio.sleep_until(since + LINGER_SECONDS)

    @asynccontextmanager
    async def visit(
        self, peer: PeerId, addresses: Sequence[str], protocols: Sequence[str] = ()
    ) -> AsyncGenerator[None, None]:
        """Be connected to a peer, which may use these protocols meanwhile.

        Raises PeerUnreachable. If cancelled: the peer is let go.
        """
        if self._is_member(peer) or self._is_guest(peer):
            await self._host.connect(peer, addresses)
            yield
            return
        token = object()
        await self._places.acquire_on_behalf_of(token)
        try:
            self.take_in(peer)  # whoever came by itself stays when we have no more questions
            grant = self._grant(peer, frozenset(protocols))
            reached = False
            try:
                await self._host.connect(peer, addresses)
                reached = True
                yield
            finally:
                self._release(peer, grant, linger=reached)
        finally:
            self._places.release_on_behalf_of(token)

    def take_in(self, peer: PeerId) -> bool:
        """Let a connected stranger stay, that is of no network of ours. Whether it may."""
        stranger = peer in self._host.peers and not self._is_member(peer) and not self._is_guest(peer)
        if not self._offers or not stranger:
            return False
        self._visitors[peer] = self._grant(peer, self._offers | self._entrance)
        _log.info("visitor.came", peer=peer, visitors=len(self._visitors))
        if len(self._visitors) > MAX_VISITORS:
            self._see_off(next(iter(self._visitors)))
        return True

    async def _follow(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async for event in events:
            if event.connected:
                continue
            if event.peer in self._visitors:
                # Even if it is back already: it may have joined meanwhile, and is to be looked at anew.
                self._see_off(event.peer)
            elif event.peer in self._lingering and event.peer not in self._host.guests:
                self._dismiss(event.peer)

    def _see_off(self, peer: PeerId) -> None:
        self._release(peer, self._visitors.pop(peer), linger=False)

    def _grant(self, peer: PeerId, protocols: frozenset[str]) -> frozenset[str]:
        self._lingering.pop(peer, None)
        self._grants.setdefault(peer, []).append(protocols)
        self._host.welcome(peer, sorted(self._offers.union(*self._grants[peer])))
        return protocols

    def _release(self, peer: PeerId, protocols: frozenset[str], *, linger: bool) -> None:
        grants = self._grants[peer]
        grants.remove(protocols)
        if self._is_guest(peer):  # the configuration has made it one meanwhile
            if not grants:
                del self._grants[peer]
            return
        self._host.welcome(peer, sorted(self._offers.union(*grants)))
        if grants:
            return
        del self._grants[peer]
        self._lingering[peer] = trio.current_time()
        self._lingers.set()
        if not linger:
            self._dismiss(peer)
        elif len(self._lingering) > MAX_LINGERING:
            self._dismiss(next(iter(self._lingering)))

    def _dismiss(self, peer: PeerId) -> None:
        del self._lingering[peer]
        if self._nursery is not None and not self._is_guest(peer):  # a node that stops lets everybody go
            self._nursery.start_soon(self._send_away, peer)

    async def _send_away(self, peer: PeerId) -> None:
        if peer not in self._grants:  # nobody has come to want it meanwhile
            await self._host.dismiss(peer, "there is nothing more to ask")
