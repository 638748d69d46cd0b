"""The cause of a trouble stands where the person looks, on whichever device it is."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from meshnode.api.status import status_of
from meshnode.cli.status import describe
from meshnode.core.errors import Declined
from meshnode.sim.world import World


async def test_what_is_wrong_on_another_device_is_said_by_every_node(world: World, autojump_clock: MockClock) -> None:
    world.add(1, memory="1MB")
    world.add(1, memory="20kB")
    await world.start_all()
    await world.publish("n1")
    said = []

    def told() -> bool:
        said[:] = [peer.trouble for peer in status_of(world["n1"].running).peers]
        return any(said)

    await world.until(told)
    assert "serve.memory" in said[0]
    assert "n2 says: " in describe(status_of(world["n1"].running))
    with pytest.raises(Declined, match=r"n2 says: No layer .* fits .*serve\.memory"):
        await world.ask("n1")
