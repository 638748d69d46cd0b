"""What happens to a world."""

from __future__ import annotations

from typing import Final

import trio

from meshnode.sim.model import ModelSpec
from meshnode.sim.world import World

KV_FACTOR: Final = 2.0  # for weights, and for keys and values beside them
SPLIT_S: Final = 30.0  # longer than a lease: both sides give the other one up


async def heal(world: World, *, nodes: int = 20, layers: int = 24) -> dict[str, float]:
    """Nodes join and place a model, a quarter of them dies, the rest is split in two and joined again.

    Returns how long each step took, in virtual seconds. Raises AssertionError when an answer differs from the first
    one, trio.TooSlowError when the mesh does not heal.
    """
    spec = ModelSpec(layers=layers)
    spare = 1.6  # so much more memory than the model takes, all nodes together: a quarter of them may die
    memory = round(spare * spec.layers * spec.layer_bytes * KV_FACTOR / nodes + 2 * spec.end_bytes)
    devices = world.add(nodes, memory=f"{memory}B")
    await world.start_all()
    figures = {"all see each other": await world.until(world.connected)}
    await world.publish("n1", spec)
    figures["the model is placed"] = await world.until(world.all_ready)
    answer = await world.ask(devices[-1].name)

    dead = [device.name for device in devices[2 :: len(devices) // (len(devices) // 4)]][: len(devices) // 4]
    await world.crash(*dead)
    await world.until(lambda: not world.all_ready())
    figures[f"ready after {len(dead)} died"] = await world.until(world.all_ready)
    assert await world.ask("n1") == answer, "an answer changed when nodes died"

    names = [device.name for device in world.up]
    world.split(names[: len(names) // 3], names[len(names) // 3 :])
    await trio.sleep(SPLIT_S)
    world.network.heal()
    figures["whole after a split"] = await world.until(lambda: world.connected() and world.all_ready())
    assert await world.ask(names[-1]) == answer, "an answer changed when the mesh was split"
    return figures
