"""What a simulated mesh really serves, and whose own move has left a hole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio
from nacl.signing import SigningKey

from meshnode.model.fit import ModelFacts, Range, facts_of
from meshnode.sim.model import ModelSpec, make_model
from meshnode.sim.world import Device, World

SPEC: Final = ModelSpec(layers=12, layer_bytes=20_000, end_bytes=30_000)
FACTS: Final[ModelFacts] = facts_of(make_model(SPEC, SigningKey(bytes(32)), 1).manifest, "int4")
SLACK: Final = 5_000  # bytes beyond what layers take


def memory_for(layers: int) -> str:
    """What a node gives that takes so many layers, with either end."""
    return f"{FACTS.need(0, layers) + SLACK}B"


def span_of(device: Device) -> Range | None:
    """The layers of the served model that a device serves."""
    if device.node is None:
        return None
    opened, release = device.node.spans.serving, device.node.releases.current
    return None if opened is None or release is None else release.layers_of(opened.span)


class Coverage:
    """An eye on a world that serves SPEC."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.moves = 0
        self.voluntary_holes: list[str] = []
        self._nursery = nursery
        self._spans: dict[str, Range | None] = {}
        self._complete = False

    async def start(self, *names: str) -> None:
        for name in names:
            await self.world.start(name)
            self._nursery.start_soon(self._watch, self.world[name])

    async def join(self, count: int = 1, **settings: object) -> list[Device]:
        """New devices, running."""
        added = self.world.add(count, **settings)  # type: ignore[arg-type]
        await self.start(*(device.name for device in added))
        return added

    async def crash(self, *names: str) -> None:
        await self.world.crash(*names)
        for name in names:
            self._spans.pop(name, None)
        self._complete = not self.holes()

    async def _watch(self, device: Device) -> None:
        changes = device.running.spans.changes
        version = changes.version
        while device.node is not None:
            version = await changes.wait(version)
            self._look(device)

    def _look(self, device: Device) -> None:
        before, now = self._spans.get(device.name), span_of(device)
        self._spans[device.name] = now
        if before == now:
            return
        self.moves += before is not None
        leaves = device.node is None or device.node.directory.me().leaving  # a person's order
        if before is not None and self._complete and self.holes() and not leaves:
            self.voluntary_holes.append(f"{trio.current_time():.2f}: {device.name} left {before} for {now}")
        self._complete = not self.holes()

    def spans(self) -> dict[str, Range]:
        """By name of the device."""
        return {device.name: span for device in self.world.up if (span := span_of(device)) is not None}

    def holes(self) -> list[int]:
        covered = {layer for span in self.spans().values() for layer in range(*span)}
        return [layer for layer in range(FACTS.layers) if layer not in covered]

    async def covered(self, within_s: float) -> float:
        """Seconds until every layer is served."""
        return await self.world.until(lambda: not self.holes(), within_s=within_s)


@asynccontextmanager
async def covering(seed: int, *, first: str = "0B") -> AsyncIterator[Coverage]:
    """A world whose first node has published SPEC. `first`: the memory that it gives."""
    async with World.open(seed) as world, trio.open_nursery() as nursery:
        coverage = Coverage(world, nursery)
        await coverage.join(memory=first)
        await world.publish("n1", SPEC)
        yield coverage
        nursery.cancel_scope.cancel()
