"""The links part of our advert: how far away every connected peer is."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import trio

from meshnode.net.port import Host
from meshnode.services.port import Directory
from protocols.advert.messages import RoundTrip

MAX_LINKS: Final = 64


class RoundTripsService:
    """Advertises the round trips that the host measures, when one of them has moved by enough to matter."""

    name = "links"

    def __init__(self, host: Host, directory: Directory) -> None:
        self._host = host
        self._directory = directory

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the advert right until cancelled."""
        task_status.started()
        while True:
            version = self._host.links.version
            me, trips = self._directory.me(), self._round_trips()
            if trips != me.round_trips:
                self._directory.advertise(replace(me, round_trips=trips))
            await self._host.links.wait(version)

    def _round_trips(self) -> tuple[RoundTrip, ...]:
        known = ((peer, self._host.round_trip_us(peer)) for peer in self._host.peers)
        return tuple(RoundTrip(peer=peer, us=us) for peer, us in known if us is not None)[:MAX_LINKS]
