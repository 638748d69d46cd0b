"""How far away peers are, as the adverts say."""

from __future__ import annotations

from trio.testing import MockClock

from meshnode.services.round_trips import CALM_S
from meshnode.sim.world import World
from protocols.ids import PeerId


async def test_round_trips_are_advertised_when_they_are_measured_and_when_they_move(
    world: World, autojump_clock: MockClock
) -> None:
    world.add(2)
    await world.start_all()
    one, other = (world[name].peer_id for name in ("n1", "n2"))

    def told() -> dict[PeerId, int]:
        """What n2 has heard of n1."""
        advert = world["n2"].running.directory.live().get(one)
        return {} if advert is None else {PeerId(trip.peer): trip.us for trip in advert.round_trips}

    await world.until(lambda: 0 < told().get(other, 0) < 100_000)
    world.network.set_link(one, other, delay=0.2)
    await world.until(lambda: told() == {other: 400_000}, within_s=CALM_S + 5)
    await world.crash("n2")
    await world.start("n2")
    await world.until(lambda: told() == {other: 400_000}, within_s=30)
