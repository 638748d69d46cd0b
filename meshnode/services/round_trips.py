"""The links part of our advert: how far away every connected peer is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import trio

from meshnode.net.port import Host
from meshnode.services.port import Directory
from protocols.advert.messages import RoundTrip
from protocols.ids import PeerId

MAX_LINKS: Final = 64
MOVE: Final = (
    0.5  # of the larger one; less than this, or than MOVE_US, changes no route worth an advert of everything
)
MOVE_US: Final = 2000  # on a busy machine a round trip of 1 ms takes 3 now and then
CALM_S: Final = 10.0  # between adverts for the sake of round trips that have moved


class RoundTripsService:
    """Advertises the round trips that the host measures, when one of them has moved by enough to matter.

    An advert of a large mesh names many links, one of which always moves: what is new or gone is said at once, moves
    are said together.
    """

    name = "links"

    def __init__(self, host: Host, directory: Directory) -> None:
        self._host = host
        self._directory = directory

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the advert right until cancelled."""
        task_status.started()
        said_at = -math.inf
        while True:
            version = self._host.links.version
            now, trips = trio.current_time(), self._round_trips()
            said = {trip.peer: trip.us for trip in self._directory.me().round_trips}
            others = trips.keys() != said.keys()
            moved = any(_moved(said[peer], us) for peer, us in trips.items() if peer in said)
            if others or (moved and now >= said_at + CALM_S):
                said_at = now
                listed = tuple(RoundTrip(peer=peer, us=us) for peer, us in trips.items())
                self._directory.advertise(replace(self._directory.me(), round_trips=listed))
            with trio.move_on_at(said_at + CALM_S if moved and not others else math.inf):
                await self._host.links.wait(version)

    def _round_trips(self) -> dict[PeerId, int]:
        known = ((peer, self._host.round_trip_us(peer)) for peer in self._host.peers)
        return dict([(peer, us) for peer, us in known if us is not None][:MAX_LINKS])


def _moved(before: int, now: int) -> bool:
    return abs(now - before) > max(MOVE * max(before, now), MOVE_US)
