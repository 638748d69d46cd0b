"""Keeps connections to guests: IPFS nodes outside the network that may exchange blocks with us and nothing else.

They find nobody and are found by nobody: their addresses are what the owner has written into `content.ipfs_peers`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import trio

from meshnode.core.errors import PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.net.port import Host
from protocols.ids import PeerId, short

FIRST_PAUSE_SECONDS: Final = 0.5  # between dials; doubles with every failure
LAST_PAUSE_SECONDS: Final = 30.0
STEADY_SECONDS: Final = 10.0  # a connection this old forgets earlier failures

_log = get_logger("guests")


class GuestService:
    """Dials every guest until it is connected, and again when it went away."""

    name = "guests"

    def __init__(self, host: Host, addresses: Sequence[str], protocols: Sequence[str], rng: random.Random) -> None:
        """Welcomes the guests at the host: make it before `host.run`.

        Args:
          addresses: multiaddrs with /p2p/<peer id>; several of one peer are tried in turn.
          protocols: what a guest may use.
          rng: spreads the retries.
        """
        self._host = host
        self._rng = rng
        self._addresses: dict[PeerId, list[str]] = {}
        self._failures: dict[PeerId, str] = {}
        for address in addresses:
            # An older IPFS node has an RSA key, so that this need not be the id of an Ed25519 key.
            peer = PeerId(address.rpartition("/p2p/")[2])
            self._addresses.setdefault(peer, []).append(address)
        for peer in self._addresses:
            host.welcome(peer, protocols)

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Every guest, connected or not, in the order of the setting."""
        return tuple(self._addresses)

    def failures(self) -> dict[PeerId, str]:
        """Why a guest is not connected, in a sentence."""
        return {peer: why for peer, why in self._failures.items() if peer not in self._host.guests}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dial until cancelled."""
        async with trio.open_nursery() as nursery:
            for peer, addresses in self._addresses.items():
                nursery.start_soon(self._keep, peer, addresses)
            task_status.started()
            await trio.sleep_forever()

    async def _keep(self, peer: PeerId, addresses: Sequence[str]) -> None:
        events = self._host.guest_events()
        failures = 0
        while True:
            try:
                await self._host.connect(peer, addresses)
            except PeerUnreachable as error:
                self._failures[peer] = str(error)
                _log.debug("guest.unreachable", peer=peer, reason=str(error), failures=failures)
            else:
                began = trio.current_time()
                _log.info("guest.connected", peer=peer)
                reason = ""
                while peer in self._host.guests:
                    event = await events.receive()
                    if event.peer == peer and not event.connected:
                        reason = event.reason
                self._failures[peer] = f"{short(peer)} left: {reason or 'the connection was closed'}"
                _log.info("guest.left", peer=peer, reason=reason)
                if trio.current_time() - began >= STEADY_SECONDS:
                    failures = 0
            pause = min(LAST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 16))
            failures += 1
            await trio.sleep(pause * self._rng.uniform(0.5, 1.0))
