"""Which release is served: announced, its manifest fetched again and again, and one that was added by its CID."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from protocols.ids import DAG_CBOR, RAW, Cid, cid_of
from protocols.manifest.codec import sign_manifest
from protocols.manifest.messages import FileRef
from tests.adverts import key_of
from tests.manifests import KEY as MANIFEST_KEY
from tests.manifests import manifest_of

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
        self.first: list[Announcement] = []  # before `head`
        self.changes = Changes()
        self.state = MemoryState()
        self.health = Health(trio.current_time)
        here: Any = self
        self.shown: tuple[Cid, str] | None = None
        self.service = ReleasesService(here, _Content(self), here, self.state, here, self.health)

    def serve(self, release: tuple[Cid, str] | None) -> None:
        self.shown = release

    def announcement(self) -> Announcement | None:
        return next(iter(self.ranked()), None)

    def ranked(self) -> tuple[Announcement, ...]:
        return (*self.first, *(() if self.head is None else (self.head,)))

    def says(self, publisher: str, manifest: Cid) -> None:
        """Somebody's word, which goes before all others."""
        self.announce(name="noise", version="v", manifest=manifest, variant="int4")
        assert self.head is not None
        others = [one for one in self.first if one.peer != publisher]
        self.first, self.head = [replace(self.head, peer=publisher), *others], None
        self.changes.notify()

    def falls_silent(self, publisher: str) -> None:
        self.first = [one for one in self.first if one.peer != publisher]
        self.changes.notify()

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


async def test_a_choice_that_is_refused_at_the_start_is_told(
    autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A founder's device has spoken since, or the role publish was taken from us."""
    world = World()

    def announce(**_: Any) -> None:
        raise Declined("forbidden", "a founder's device goes before this node")

    monkeypatch.setattr(world, "announce", announce)
    releases.serve_later(world.state, MANIFEST, "")
    await nursery.start(world.service.run)
    await trio.sleep(60)
    (shown,) = world.health.current()
    assert shown.code == "model-refused" and "a founder's device goes before this node." in shown.text
    assert world.service.awaited is None


NOBODYS = cid_of(DAG_CBOR, b"nobody has it")  # its search goes on for ever


async def settled() -> None:
    with trio.move_on_after(100):
        await trio.sleep_forever()


async def test_what_nobody_has_does_not_replace_what_is_served(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(absences=1000)
    have(world, MODEL)
    world.says("owner", MANIFEST)
    await nursery.start(world.service.run)
    await world.until(lambda: world.service.current is not None)
    before = world.service.current
    world.says("other", NOBODYS)
    await settled()
    assert world.service.current is before and world.shown == (MANIFEST, "int4")
    (shown,) = world.health.current()
    assert shown.code == "release-missing" and "noise int4 is served" in shown.text
    world.says("owner", OTHER)  # the publisher of what is served says something else, which nobody has either
    await settled()
    assert world.service.current is before
    have(world, OTHER_MODEL)
    world.changes.notify()
    await world.until(lambda: world.service.current is not before)
    assert world.service.current is not None and world.service.current.cid == OTHER
    assert world.shown == (OTHER, "int4")
    assert world.health.current() == []


async def test_what_was_served_goes_on_after_a_restart(autojump_clock: MockClock) -> None:
    world = World(absences=1000)
    have(world, MODEL)
    world.says("owner", MANIFEST)
    async with trio.open_nursery() as nursery:
        await nursery.start(world.service.run)
        await world.until(lambda: world.service.current is not None)
        nursery.cancel_scope.cancel()
    world.says("owner", NOBODYS)
    here: Any = world
    again = ReleasesService(here, _Content(world), here, world.state, here, world.health)
    async with trio.open_nursery() as nursery:
        await nursery.start(again.run)
        await settled()
        assert again.current is not None and again.current.cid == MANIFEST
        world.falls_silent("owner")
        await settled()
        assert again.current is None, "its publisher has no word any more: it was put out, or took it back"
        nursery.cancel_scope.cancel()


async def test_a_new_node_takes_the_first_that_can_be_had(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    world = World(absences=1000)
    have(world, MODEL)
    world.says("owner", MANIFEST)
    world.says("other", NOBODYS)
    await nursery.start(world.service.run)
    await world.until(lambda: world.service.current is not None)
    assert world.service.current is not None and world.service.current.cid == MANIFEST
    world.falls_silent("owner")
    await settled()
    assert world.service.current is None


TRAINED = manifest_of(
    lambda name: FileRef(cid=cid_of(RAW, name.encode()), size=1), layers=2, variants=("int4", "train")
)
TRAINED_BLOCK = sign_manifest(MANIFEST_KEY, TRAINED)


async def test_what_is_for_training_is_not_served(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    world = World()
    cid = cid_of(DAG_CBOR, TRAINED_BLOCK)
    world.blocks[cid] = TRAINED_BLOCK
    await nursery.start(world.service.run)
    with pytest.raises(Declined, match="the variant train of tiny is for training and can't be served; choose int4"):
        world.service.announce(cid, "train")
    assert world.head is None
    world.announce(name="tiny", version="v", manifest=cid, variant="train")  # somebody else says so
    await trio.sleep(100)
    assert world.service.current is None
    world.blocks[cid] = TRAINED_BLOCK  # it was asked for again, and this content gives something else
    world.service.announce(cid, "")
    await world.until(lambda: world.service.current is not None)
    assert world.service.current is not None and world.service.current.title == "tiny int4"
