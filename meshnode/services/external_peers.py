"""Keeps connections to guests: IPFS nodes outside the network that may exchange blocks with us and nothing else.

They find nobody and are found by nobody: their addresses are what the owner has written into `content.ipfs_peers`,
and what the daemon of `content.ipfs_api` says about itself.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Final

import trio

from meshnode.core.clock import Wall, wall_ms
from meshnode.core.errors import PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.net.port import Host, PeerEvent
from protocols.ids import PeerId, short

FIRST_PAUSE_SECONDS: Final = 0.5  # between dials; doubles with every failure
LAST_PAUSE_SECONDS: Final = 30.0
STEADY_SECONDS: Final = 10.0  # a connection this old forgets earlier failures

_log = get_logger("guests")


class _Guest:
    """One guest and how it is reached."""

    def __init__(self, peer: PeerId, setting: str) -> None:
        self.peer = peer
        self.setting = setting  # where its owner has named it
        self.addresses: list[str] = []
        self.failure = ""
        self.since_ms = 0  # when it went out of reach; 0: it has not
        self.scope = trio.CancelScope()


class GuestService:
    """Dials every guest until it is connected, and again when it went away; the health says which ones are."""

    name = "guests"

    def __init__(
        self,
        host: Host,
        addresses: Sequence[str],
        protocols: Sequence[str],
        rng: random.Random,
        *,
        health: Health | None = None,
        wall: Wall = wall_ms,
    ) -> None:
        """Welcomes the guests at the host.

        Args:
          addresses: multiaddrs with /p2p/<peer id>; several of one peer are tried in turn.
          protocols: what a guest may use.
          rng: spreads the retries.
        """
        self._host = host
        self._rng = rng
        self._protocols = tuple(protocols)
        self._health = Health() if health is None else health
        self._wall = wall
        self._guests: dict[PeerId, _Guest] = {}
        self._nursery: trio.Nursery | None = None
        for address in addresses:
            # An older IPFS node has an RSA key, so that this need not be the id of an Ed25519 key.
            peer = PeerId(address.rpartition("/p2p/")[2])
            known = self._guests[peer].addresses if peer in self._guests else []
            self.add(peer, [*known, address], "content.ipfs_peers")

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Every guest, connected or not, those of the settings first."""
        return tuple(self._guests)

    def failures(self) -> dict[PeerId, str]:
        """Why a guest is not connected, in a sentence."""
        return {
            peer: guest.failure
            for peer, guest in self._guests.items()
            if guest.failure and peer not in self._host.guests
        }

    def add(self, peer: PeerId, addresses: Sequence[str], setting: str) -> None:
        """Make a peer a guest, or tell where it is found now. `setting`: what its owner corrects if it is not.

        One that another setting names keeps the addresses from there, too.
        """
        guest = self._guests.get(peer)
        if guest is None:
            guest = self._guests[peer] = _Guest(peer, setting)
            self._host.welcome(peer, self._protocols)
            if self._nursery is not None:
                self._nursery.start_soon(self._keep, guest)
        kept = guest.addresses if guest.setting != setting else []
        guest.addresses = list(dict.fromkeys((*kept, *addresses)))

    async def remove(self, peer: PeerId, setting: str, reason: str) -> None:
        """It is no guest any more, unless another setting names it; its connections are closed."""
        guest = self._guests.get(peer)
        if guest is not None and guest.setting == setting:
            del self._guests[peer]
            guest.scope.cancel()
            self._health.clear("guest-unreachable", guest=short(peer))
            await self._host.dismiss(peer, reason)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dial until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for guest in self._guests.values():
                nursery.start_soon(self._keep, guest)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def _keep(self, guest: _Guest) -> None:
        guest.scope = trio.CancelScope()
        with guest.scope, self._host.guest_events() as events:
            failures = 0
            while True:
                try:
                    await self._host.connect(guest.peer, guest.addresses)
                except PeerUnreachable as error:
                    self._away(guest, str(error).removeprefix(f"{guest.peer} can't be reached: "))
                    _log.debug("guest.unreachable", peer=guest.peer, reason=str(error), failures=failures)
                else:
                    if await self._stay(guest, events) >= STEADY_SECONDS:
                        failures = 0
                pause = min(LAST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 16))
                failures += 1
                await self._pause(guest, events, pause * self._rng.uniform(0.5, 1.0))

    async def _stay(self, guest: _Guest, events: trio.MemoryReceiveChannel[PeerEvent]) -> float:
        """Wait until a connected guest leaves; how long it was there, in seconds."""
        began = trio.current_time()
        guest.since_ms = 0
        self._health.clear("guest-unreachable", guest=short(guest.peer))
        _log.info("guest.connected", peer=guest.peer)
        reason = ""
        while guest.peer in self._host.guests:
            event = await events.receive()
            if event.peer == guest.peer and not event.connected:
                reason = event.reason
        self._away(guest, f"it left: {reason or 'the connection was closed'}")
        _log.info("guest.left", peer=guest.peer, reason=reason)
        return trio.current_time() - began

    async def _pause(self, guest: _Guest, events: trio.MemoryReceiveChannel[PeerEvent], seconds: float) -> None:
        """Wait before the next dial, unless the guest comes by itself."""
        with trio.move_on_after(seconds):
            while guest.peer not in self._host.guests:
                await events.receive()

    def _away(self, guest: _Guest, reason: str) -> None:
        guest.failure = f"{short(guest.peer)} can't be reached: {reason}"
        guest.since_ms = guest.since_ms or self._wall()
        self._health.set(
            "guest-unreachable",
            guest=short(guest.peer),
            addresses=", ".join(address.partition("/p2p/")[0] for address in guest.addresses)
            or "no address is known",
            since=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(guest.since_ms / 1000)),
            reason=reason,
            setting=guest.setting,
        )
