"""How many copies of every file there are, who makes them, and what no full disk may take."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from nacl.signing import SigningKey
from trio.testing import MockClock

from meshnode.config.settings import ContentSection
from meshnode.core.errors import ContentUnavailable, DiskError
from meshnode.services.replication.copies import LATE_S, SETTLE_S, Duties
from meshnode.sim import world as simulated
from meshnode.sim.model import ModelSpec, make_model
from meshnode.sim.world import Device, World
from meshnode.store.blob_store import BlobStore
from protocols.advert.leases import LEASE_S
from protocols.ids import Cid
from protocols.manifest.messages import FileRef

PIECE = 100_000
SPEC = ModelSpec(layers=8, layer_bytes=PIECE, end_bytes=PIECE)
REFS = make_model(SPEC, SigningKey(bytes(32)), 1).manifest.files_of("int4")
FILES = {ref.cid for ref in REFS}
PLENTY = 1 << 30
SOON = SETTLE_S + 15.0


class Copies:
    """A world whose nodes serve nothing: whatever they fetch are copies."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self._monkeypatch = monkeypatch

    async def join(self, *, replicas: int = 2, quota: int = PLENTY, folder: Path | None = None) -> Device:
        (device,) = self.world.add(memory="0B", content=ContentSection(replicas=replicas))
        device.folder = folder or device.folder
        with self._monkeypatch.context() as patch:
            patch.setattr(simulated, "QUOTA_BYTES", quota)
            await self.world.start(device.name)
        return device

    async def publish(self) -> None:
        await self.world.publish("n1", SPEC)

    def count(self) -> list[int]:
        return [sum(ref.cid in held(device) for device in self.world.up) for ref in REFS]

    async def reach(self, count: int, within_s: float = SOON) -> None:
        await self.world.until(lambda: min(self.count()) == count, within_s=within_s)


@pytest.fixture
async def mesh(world: World, monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(world, monkeypatch)


def held(device: Device) -> frozenset[Cid]:
    assert device.store is not None
    return device.store.files() & FILES


def pinned(device: Device, name: str) -> frozenset[Cid]:
    assert device.store is not None
    return device.store.pins().get(name, frozenset())


def shown(device: Device, code: str) -> list[str]:
    return [warning.text for warning in device.running.health.current() if warning.code == code]


async def test_every_file_gets_its_second_copy_and_no_third(mesh: Copies, autojump_clock: MockClock) -> None:
    devices = [await mesh.join() for _ in range(4)]
    await mesh.publish()
    await mesh.reach(2)
    await trio.sleep(3 * LATE_S)
    assert set(mesh.count()) == {2}
    assert all(held(device) for device in devices), "the others share the work"
    for device in devices:
        counted = device.running.replication.copies()
        assert counted is not None
        assert (counted.wanted, counted.fewest, counted.short) == (2, 2, ())
        assert not shown(device, "few-copies")
        # It is small, and without it nobody knows after a restart which files are of the model.
        release = device.running.releases.current
        assert release is not None and release.cid in pinned(device, "mesh-last")


async def test_more_copies_where_the_setting_says_so_but_not_more_than_nodes(
    mesh: Copies, autojump_clock: MockClock
) -> None:
    one, *_ = [await mesh.join(replicas=5) for _ in range(3)]
    await mesh.publish()
    await mesh.reach(3)
    counted = one.running.replication.copies()
    assert counted is not None and counted.wanted == 3


async def test_what_serving_needs_goes_first(mesh: Copies, autojump_clock: MockClock) -> None:
    class Loading:
        loading = "layers"

    one, two = await mesh.join(), await mesh.join()
    replication = two.running.replication
    before, replication._duties = replication._duties, Duties(Loading(), two.running.load)  # type: ignore[arg-type]
    await mesh.publish()
    await trio.sleep(60)
    assert not held(two)
    counted = one.running.replication.copies()
    assert counted is not None and counted.planned == len(counted.short) > 0
    replication._duties = before
    await mesh.reach(2)


async def test_the_next_in_rank_makes_the_copy_of_a_node_that_does_not(
    mesh: Copies, autojump_clock: MockClock
) -> None:
    async def fail(file: FileRef) -> None:
        raise ContentUnavailable("nobody gives it", cid=file.cid)

    _, two, _ = [await mesh.join() for _ in range(3)]
    two.running.content.fetch = fail  # type: ignore[method-assign, assignment]
    await mesh.publish()
    await trio.sleep(SOON)
    assert min(mesh.count()) == 1, "some files were to go to the broken one"
    await mesh.reach(2, 2 * LATE_S)
    assert not held(two)


async def test_a_mesh_without_room_says_so_and_takes_the_next_node(mesh: Copies, autojump_clock: MockClock) -> None:
    one, _ = await mesh.join(), await mesh.join(quota=3 * PIECE + 20_000)
    await mesh.publish()
    await trio.sleep(SETTLE_S + 90)
    homeless = mesh.count().count(1)
    assert homeless in (7, 8)
    (text,) = shown(one, "few-copies")
    assert f"{homeless} files of noise" in text and "no other node has room for them (7" in text
    counted = one.running.replication.copies()
    assert counted is not None and (len(counted.short), counted.planned) == (homeless, 0)
    await mesh.join()
    await mesh.reach(2)
    await trio.sleep(2)
    assert not shown(one, "few-copies")


async def test_a_node_alone_has_nothing_to_do_and_keeps_everything(mesh: Copies, autojump_clock: MockClock) -> None:
    one = await mesh.join()
    await mesh.publish()
    await trio.sleep(120)
    assert not shown(one, "few-copies")
    assert pinned(one, "mesh-last") >= FILES


async def test_a_full_disk_never_takes_the_last_copy(mesh: Copies, autojump_clock: MockClock, tmp_path: Path) -> None:
    """One of two holders needs room: what the other is sure to keep may go, nothing else."""
    total = sum(ref.size for ref in REFS)
    await mesh.join()
    two = await mesh.join(quota=total + PIECE)
    await mesh.publish()
    await mesh.reach(2)
    await trio.sleep(2)  # the pins follow
    last, spare = pinned(two, "mesh-last") & FILES, pinned(two, "mesh-spare") & FILES
    assert last and spare
    assert last | spare == FILES and not last & spare
    await mesh.world.crash("n1")  # and before anybody notices:
    store = two.store
    assert store is not None
    source = tmp_path / "more"
    source.write_bytes(random.Random(2).randbytes(2 * PIECE))
    store.add_file(source, pin="mine")
    assert last <= held(two)
    assert 1 <= len(spare - held(two)) < len(spare), "as many as were needed"
    source.write_bytes(random.Random(3).randbytes(total))
    with pytest.raises(DiskError, match="the last copy in the mesh"):
        store.add_file(source, pin="mine")
    assert last <= held(two)


async def test_protection_outlives_a_restart(mesh: Copies, autojump_clock: MockClock, tmp_path: Path) -> None:
    _, two = await mesh.join(), await mesh.join()
    await mesh.publish()
    await mesh.reach(2)
    await trio.sleep(2)
    last = pinned(two, "mesh-last") & FILES
    await mesh.world.crash("n2")
    again = BlobStore(two.folder, 1)
    source = tmp_path / "more"
    source.write_bytes(b"x" * 1000)
    with pytest.raises(DiskError):
        again.add_file(source, pin="mine")
    assert last and last <= again.files()
    again.close()


async def test_a_quota_below_what_is_held_is_told(mesh: Copies, autojump_clock: MockClock) -> None:
    one = await mesh.join()
    await mesh.publish()
    await trio.sleep(SOON)
    assert not shown(one, "quota-exceeded")
    await mesh.world.crash("n1")
    again = await mesh.join(quota=2 * PIECE, folder=one.folder)
    await trio.sleep(2)
    (text,) = shown(again, "quota-exceeded")
    assert "take 1.01 MB, more than its content.quota of 200 kB" in text and "Raise content.quota" in text


async def test_what_becomes_the_last_copy_is_protected_while_another_one_is_fetched(
    mesh: Copies, autojump_clock: MockClock
) -> None:
    async def hang(file: FileRef) -> None:
        await trio.sleep_forever()

    _, two = await mesh.join(), await mesh.join()
    await mesh.publish()
    await mesh.reach(2)
    two.running.content.fetch = hang  # type: ignore[method-assign, assignment]
    assert two.store is not None
    two.store.remove(REFS[0].cid)
    await trio.sleep(SOON)  # by now it is being fetched again
    await mesh.world.crash("n1")
    await trio.sleep(LEASE_S + 2)
    assert {ref.cid for ref in REFS[1:]} <= pinned(two, "mesh-last")


async def test_protection_stays_until_it_is_known_what_the_network_serves(
    mesh: Copies, autojump_clock: MockClock
) -> None:
    """A node that starts has no manifest, or no certificate of the publisher, for a while."""
    one = await mesh.join()
    await mesh.publish()
    await trio.sleep(2)
    assert pinned(one, "mesh-last") >= FILES
    await mesh.world.crash("n1")
    again = await mesh.join(folder=one.folder)  # with records of nothing
    await trio.sleep(30)
    assert again.running.replication.copies() is None
    assert pinned(again, "mesh-last") >= FILES


async def test_a_slow_node_that_gets_on_is_not_stood_in_for(mesh: Copies, autojump_clock: MockClock) -> None:
    for _ in range(5):
        content = (await mesh.join()).running.content

        async def fetch(file: FileRef, fetch: Callable[[FileRef], Awaitable[None]] = content.fetch) -> None:
            await trio.sleep(25)
            await fetch(file)

        content.fetch = fetch  # type: ignore[method-assign, assignment]
    await mesh.publish()
    await mesh.reach(2, SETTLE_S + len(REFS) * 26.0)
    await trio.sleep(60)
    assert set(mesh.count()) == {2}


@pytest.mark.parametrize("room", [5, 9])
async def test_nodes_that_want_different_numbers_of_copies_come_to_rest(
    mesh: Copies, autojump_clock: MockClock, room: int
) -> None:
    """And so do those whose quota is full: nobody evicts what is fetched again."""
    devices = [
        await mesh.join(replicas=replicas, quota=(1000 if replicas == 1 else room) * PIECE + 10_000)
        for replicas in (1, 3, 2, 4)
    ]
    await mesh.publish()
    await trio.sleep(300)
    before = [device.running.content.bytes_fetched for device in devices]
    assert any(before)
    await trio.sleep(300)
    assert [device.running.content.bytes_fetched for device in devices] == before
    for device, fetched in zip(devices[1:], before[1:], strict=True):
        assert fetched < 1.02 * sum(ref.size for ref in REFS if ref.cid in held(device)) + 10_000, "fetched twice"
    assert min(mesh.count()) >= 2 or room == 5


async def test_a_mesh_that_stops_as_a_whole_does_not_wait(mesh: Copies, autojump_clock: MockClock) -> None:
    devices = [await mesh.join() for _ in range(3)]
    await mesh.publish()
    await trio.sleep(2)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for device in devices:
            nursery.start_soon(mesh.world.leave, device.name)
    assert trio.current_time() - began < 5.0, trio.current_time() - began


async def test_a_node_that_nobody_can_relieve_leaves_at_once(mesh: Copies, autojump_clock: MockClock) -> None:
    await mesh.join()
    await mesh.join(quota=1000)
    await mesh.publish()
    await trio.sleep(2)
    began = trio.current_time()
    await mesh.world.leave("n1")
    assert trio.current_time() - began < 1.0
