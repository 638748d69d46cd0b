"""Which release is served: announced, its manifest fetched again and again, and one that was added by its CID."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import ContentUnavailable, Declined
from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.services.releases import ReleasesService
from meshnode.sim.model import ModelSpec, ToyModel, make_model
from meshnode.state import releases
from meshnode.state.memory_state import MemoryState
from protocols.advert.messages import Announcement
from protocols.ids import DAG_CBOR, Cid, cid_of
from tests.adverts import key_of

KEY = key_of(1)
MODEL = make_model(ModelSpec(layers=2, layer_bytes=10), KEY, 1)
MANIFEST = cid_of(DAG_CBOR, MODEL.block)
OTHER_MODEL = make_model(ModelSpec(name="other", layers=3, layer_bytes=10), KEY, 2)
OTHER = cid_of(DAG_CBOR, OTHER_MODEL.block)


class World:
    """What a node gives the service: a directory, content that has a manifest after some searches, a state."""

    def __init__(self, absences: int = 0) -> None:
        self.absences = absences
        self.asked: list[Cid] = []
        self.blocks: dict[Cid, bytes] = {}
        self.head: Announcement | None = None
        self.changes = Changes()
        self.state = MemoryState()
        self.health = Health(trio.current_time)
        here: Any = self
        self.service = ReleasesService(here, _Content(self), here, self.state, self.health)

    def announcement(self) -> Announcement | None:
        return self.head

    def announce(self, *, name: str, version: str, manifest: Cid, variant: str) -> None:
        self.head = Announcement(
            peer="p",
            incarnation=1,
            sequence=1,
            created_ms=1,
            name=name,
            version=version,
            manifest=manifest,
            variant=variant,
        )
        self.changes.notify()

    def block(self, cid: Cid) -> bytes | None:
        return self.blocks.get(cid)

    async def until(self, condition: Callable[[], bool]) -> None:
        version = self.service.changes.version
        while not condition():
            version = await self.service.changes.wait(version)


class _Content:
    def __init__(self, world: World) -> None:
        self._world = world

    async def block(self, cid: Cid) -> bytes:
        self._world.asked.append(cid)
        await trio.sleep(30)
        if len(self._world.asked) <= self._world.absences:
            raise ContentUnavailable(f"nobody gave {cid}", cid=cid)
        model = {MANIFEST: MODEL, OTHER: OTHER_MODEL}.get(cid)
        self._world.blocks[cid] = b"no manifest" if model is None else model.block
        return self._world.blocks[cid]

    async def fetch(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    async def open(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def have(world: World, model: ToyModel) -> None:
    world.blocks[cid_of(DAG_CBOR, model.block)] = model.block


async def test_what_is_announced_is_served_once_its_manifest_came(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(absences=2)
    await nursery.start(world.service.run)
    assert "the network serves no model yet" in world.service.why_none
    world.announce(name="noise", version="v", manifest=MANIFEST, variant="int4")
    await trio.testing.wait_all_tasks_blocked()
    assert world.service.current is None
    assert world.service.why_none == "the description of the model noise has not arrived yet"
    await world.until(lambda: world.service.current is not None)
    assert world.service.current is not None
    assert (world.service.current.cid, world.service.current.title) == (MANIFEST, "noise int4")
    assert len(world.asked) == 3
    assert releases.known(world.state) == {MANIFEST: "int4"}


async def test_another_announcement_replaces_the_one_before(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    world = World()
    await nursery.start(world.service.run)
    world.announce(name="noise", version="v", manifest=MANIFEST, variant="int4")  # on its way when the other comes
    await trio.sleep(10)
    have(world, OTHER_MODEL)
    world.service.announce(OTHER, "")
    await world.until(lambda: world.service.current is not None)
    version = world.service.changes.version
    await trio.sleep(100)
    assert world.service.current is not None and world.service.current.cid == OTHER
    assert world.service.changes.version == version
    world.head = None
    world.changes.notify()
    await world.until(lambda: world.service.current is None)


async def test_what_is_not_here_or_has_no_such_variant_is_not_announced() -> None:
    world = World()
    with pytest.raises(Declined, match="is not in this node's store"):
        world.service.announce(MANIFEST, "")
    have(world, MODEL)
    with pytest.raises(Declined, match="noise has no variant int8; it has int4"):
        world.service.announce(MANIFEST, "int8")
    world.blocks[MANIFEST] = b"rubbish"
    with pytest.raises(Declined, match="does not hold"):
        world.service.announce(MANIFEST, "")


async def test_what_waits_comes_at_the_third_attempt(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    world = World(absences=2)
    releases.serve_later(world.state, MANIFEST, "")
    await nursery.start(world.service.run)
    assert world.service.awaited == MANIFEST
    assert world.service.why_none.startswith(f"the manifest {MANIFEST} of the model that was added here")
    await trio.sleep(45)
    (shown,) = world.health.current()
    assert shown.code == "manifest-missing" and MANIFEST in shown.text
    await world.until(lambda: world.service.current is not None)
    assert world.head is not None and (world.head.manifest, world.head.variant) == (MANIFEST, "int4")
    assert world.asked == [MANIFEST] * 3
    assert world.health.current() == [] and world.service.awaited is None


@pytest.mark.parametrize("replacement", [None, OTHER], ids=["announced otherwise", "another one"])
async def test_what_was_replaced_on_the_way_is_not_announced(
    autojump_clock: MockClock, nursery: trio.Nursery, replacement: Cid | None
) -> None:
    world = World()
    releases.serve_later(world.state, MANIFEST, "")
    await nursery.start(world.service.run)
    await trio.sleep(1)
    releases.wait_no_longer(world.state)
    if replacement is not None:
        releases.serve_later(world.state, replacement, "")
    await trio.sleep(100)
    assert (None if world.head is None else world.head.manifest) == replacement


async def test_what_is_no_manifest_is_not_tried_again(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    world = World()
    nothing = cid_of(DAG_CBOR, b"no manifest")
    releases.serve_later(world.state, nothing, "")
    await nursery.start(world.service.run)
    await trio.sleep(1000)
    assert world.head is None and world.asked == [nothing] and world.service.awaited is None
