"""Replication: real services and stores, adverts over the in-memory network, in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import ContentUnavailable, DiskError
from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.model.facts import facts_of
from meshnode.model.release import ServedRelease
from meshnode.services.inventory import InventoryService
from meshnode.services.replication.copies import LATE_S, SETTLE_S, Duties, ReplicationService, ReplicationSettings
from meshnode.services.replication.shelves import Shelves
from meshnode.store.blob_store import BlobStore
from protocols.ids import DAG_CBOR, Cid, cid_of
from protocols.manifest.messages import FileRef
from protocols.unixfs.builder import file_cid
from tests.manifests import block_of, manifest_of
from tests.services.directory_mesh import Mesh, Node, open_mesh

LAYERS = 8
LAYER_BYTES = 100_000
LEASE_S = 12.0
SOON = SETTLE_S + 15.0


def files_in(folder: Path) -> dict[str, Path]:
    """A small model's files."""
    noise = random.Random(1)
    names = ("graph", "embed", "head", "tokenizer.json", *(f"layer.{n}" for n in range(LAYERS)))
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(noise.randbytes(LAYER_BYTES))
    return {name: folder / name for name in names}


class Files:
    """What the content service does, without blocks: files are copied from a living provider."""

    def __init__(self, world: World, node: Node, store: BlobStore) -> None:
        self.world = world
        self.node = node
        self.store = store
        self.fetched: list[Cid] = []
        self.broken = False
        self.stuck = False
        self.loading: str | None = None  # layers that go first

    async def fetch(self, file: FileRef) -> None:
        await trio.sleep(float("inf") if self.stuck else self.world.fetch_s)
        providers = set(self.node.directory.providers(file.cid))
        for other in self.world.members:
            path = other.store.path(file.cid)
            if other.node.peer in providers and path is not None and not self.broken:
                self.store.add_file(path, pin="arriving")
                self.store.unpin("arriving")
                self.fetched.append(file.cid)
                return
        raise ContentUnavailable(f"nobody gives {file.cid}", cid=file.cid)


class Released:
    """What one node knows to be served: the manifest is with everybody."""

    def __init__(self, world: World, node: Node) -> None:
        self.world = world
        self.directory = node.directory
        self.changes = node.directory.changes

    @property
    def current(self) -> ServedRelease | None:
        if self.directory.announcement() is None:
            return None
        manifest = self.world.manifest
        return ServedRelease(self.world.cid, "int4", manifest, facts_of(manifest, "int4"))


@dataclass
class Member:
    node: Node
    store: BlobStore
    replication: ReplicationService
    health: Health
    files: Files
    stopped: trio.Event = field(default_factory=trio.Event)

    @property
    def fetched(self) -> list[Cid]:
        return self.files.fetched

    def holds(self, cid: Cid) -> bool:
        return self.store.path(cid) is not None

    def pinned(self, name: str) -> frozenset[Cid]:
        return self.store.pins().get(name, frozenset())


class AdvertisedLoad:
    """Nobody waits for tokens of ours."""

    sessions = queue_us = 0

    def __init__(self) -> None:
        self.changes = Changes()


class World:
    def __init__(self, mesh: Mesh, nursery: trio.Nursery, folder: Path) -> None:
        self.mesh = mesh
        self.nursery = nursery
        self.folder = folder
        self.members: list[Member] = []
        self.sources = files_in(folder / "model")
        self.manifest = manifest_of(self._ref, layers=LAYERS)
        self.cid = cid_of(DAG_CBOR, block_of(self.manifest))
        self.fetch_s = 0.05

    def _ref(self, name: str) -> FileRef:
        data = self.sources[name].read_bytes()
        return FileRef(cid=file_cid(data), size=len(data))

    @property
    def refs(self) -> list[FileRef]:
        return self.manifest.files_of("int4")

    async def join(
        self, number: int, *, quota: int = 1 << 30, replicas: int = 2, folder: int | None = None
    ) -> Member:
        store = BlobStore(self.folder / f"store-{number if folder is None else folder}", quota)
        node = await self.mesh.start(number, roles=("serve", "publish"), disk_free_bytes=store.usage().room_bytes)
        await self.mesh.full(*(member.node for member in self.members), node)
        store.put_block(block_of(self.manifest), DAG_CBOR)
        inventory = InventoryService(node.directory, store, node.health)
        files = Files(self, node, store)
        replication = ReplicationService(
            node.directory,
            Shelves(node.peer, node.directory, inventory, store),
            Released(self, node),
            files,  # type: ignore[arg-type]
            Duties(files, AdvertisedLoad()),
            ReplicationSettings(replicas=replicas),
            node.health,
        )
        member = Member(node, store, replication, node.health, files)
        self.members.append(member)
        self.nursery.start_soon(self._run, member, inventory)
        return member

    async def _run(self, member: Member, inventory: InventoryService) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inventory.run)
            nursery.start_soon(member.replication.run)
            await member.node.ended.wait()
            nursery.cancel_scope.cancel()
        member.stopped.set()

    def publish(self, member: Member) -> None:
        for path in self.sources.values():
            member.store.add_file(path, pin=str(self.cid))
        member.node.directory.announce(name="tiny", version="v1.0.0-0", manifest=self.cid, variant="int4")

    async def kill(self, member: Member) -> None:
        self.members.remove(member)
        await member.node.stop()
        await member.stopped.wait()
        member.store.close()

    def copies(self) -> list[int]:
        return [sum(member.holds(ref.cid) for member in self.members) for ref in self.refs]

    async def until(self, check: Callable[[], bool], within: float) -> None:
        with trio.fail_after(within):
            while not check():  # noqa: ASYNC110 virtual time; no event tells what is on all disks
                await trio.sleep(0.5)


@asynccontextmanager
async def open_world(rng: random.Random, folder: Path) -> AsyncIterator[World]:
    async with open_mesh(rng) as mesh, trio.open_nursery() as nursery:
        made = World(mesh, nursery, folder)
        yield made
        nursery.cancel_scope.cancel()
    for member in made.members:
        member.store.close()


async def test_every_file_gets_its_second_copy_and_no_third(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        members = [await world.join(n) for n in (1, 2, 3, 4)]
        world.publish(members[0])
        await world.until(lambda: min(world.copies()) == 2, SOON)
        await trio.sleep(3 * LATE_S)
        assert set(world.copies()) == {2}
        assert sum(len(member.fetched) for member in members) == len(world.refs)
        assert sum(bool(member.fetched) for member in members) == 3, "the others share the work"
        for member in members:
            counted = member.replication.copies()
            assert counted is not None
            assert (counted.wanted, counted.fewest, counted.short) == (2, 2, ())
            assert not [w for w in member.health.current() if w.code == "few-copies"]


async def test_more_copies_where_the_setting_says_so_but_not_more_than_nodes(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        members = [await world.join(n, replicas=5) for n in (1, 2, 3)]
        world.publish(members[0])
        await world.until(lambda: min(world.copies()) == 3, SOON)
        counted = members[0].replication.copies()
        assert counted is not None
        assert counted.wanted == 3


async def test_what_serving_needs_goes_first(autojump_clock: MockClock, rng: random.Random, tmp_path: Path) -> None:
    async with open_world(rng, tmp_path) as world:
        one, two = [await world.join(n) for n in (1, 2)]
        two.files.loading = "layers"
        world.publish(one)
        await trio.sleep(60)
        assert two.fetched == []
        counted = one.replication.copies()
        assert counted is not None and counted.planned == len(counted.short) > 0
        two.files.loading = None
        await world.until(lambda: min(world.copies()) == 2, SOON)


async def test_the_next_in_rank_makes_the_copy_of_a_node_that_does_not(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        members = [await world.join(n) for n in (1, 2, 3)]
        members[1].files.broken = True
        world.publish(members[0])
        await trio.sleep(SOON)
        assert min(world.copies()) == 1, "some files were to go to the broken one"
        await world.until(lambda: min(world.copies()) == 2, 2 * LATE_S)
        assert members[1].fetched == []


async def test_a_mesh_without_room_says_so_and_takes_the_next_node(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        one = await world.join(1)
        await world.join(2, quota=3 * LAYER_BYTES + 10_000)
        world.publish(one)
        await trio.sleep(SETTLE_S + 90)
        assert sorted(world.copies()) == [1] * 9 + [2] * 3
        warnings = [w.text for w in one.health.current() if w.code == "few-copies"]
        assert len(warnings) == 1
        assert "9 files of tiny" in warnings[0]
        assert "no other node has room for them (900kB)" in warnings[0]
        counted = one.replication.copies()
        assert counted is not None and (len(counted.short), counted.planned) == (9, 0)
        await world.join(3)
        await world.until(lambda: min(world.copies()) == 2, SOON)
        await trio.sleep(2)
        assert not [w for w in one.health.current() if w.code == "few-copies"]


async def test_a_node_alone_has_nothing_to_do_and_keeps_everything(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        one = await world.join(1)
        world.publish(one)
        await trio.sleep(120)
        assert not one.health.current()
        assert {ref.cid for ref in world.refs} <= one.pinned("mesh-last")


async def test_a_full_disk_never_takes_the_last_copy(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    """One of two holders needs room: what the other is sure to keep may go, nothing else."""
    async with open_world(rng, tmp_path) as world:
        one = await world.join(1)
        two = await world.join(2, quota=(len(world.sources) + 1) * LAYER_BYTES + 10_000)
        world.publish(one)
        await world.until(lambda: min(world.copies()) == 2, SOON)
        await trio.sleep(2)  # the pins follow
        files = {ref.cid for ref in world.refs}
        last, spare = two.pinned("mesh-last") & files, two.pinned("mesh-spare") & files
        assert last and spare
        assert last | spare == files
        assert not last & spare
        await world.kill(one)  # and before anybody notices:
        source = tmp_path / "more"
        source.write_bytes(random.Random(2).randbytes(3 * LAYER_BYTES))
        two.store.add_file(source, pin="mine")
        assert all(two.holds(cid) for cid in last)
        assert sum(not two.holds(cid) for cid in spare) == 2, "as many as were needed"
        source.write_bytes(random.Random(3).randbytes(len(world.sources) * LAYER_BYTES))
        with pytest.raises(DiskError, match="the last copy in the mesh"):
            two.store.add_file(source, pin="mine")
        assert all(two.holds(cid) for cid in last)


async def test_protection_outlives_a_restart(autojump_clock: MockClock, rng: random.Random, tmp_path: Path) -> None:
    async with open_world(rng, tmp_path) as world:
        one, two = [await world.join(n) for n in (1, 2)]
        world.publish(one)
        await world.until(lambda: min(world.copies()) == 2, SOON)
        await trio.sleep(2)
        last = two.pinned("mesh-last") & {ref.cid for ref in world.refs}
        await world.kill(two)
        again = BlobStore(tmp_path / "store-2", 1)
        source = tmp_path / "more"
        source.write_bytes(b"x" * 1000)
        with pytest.raises(DiskError):
            again.add_file(source, pin="mine")
        assert all(again.path(cid) is not None for cid in last)
        again.close()


async def test_a_quota_below_what_is_held_is_told(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        one = await world.join(1)
        world.publish(one)
        await trio.sleep(SOON)
        assert not [w for w in one.health.current() if w.code == "quota-exceeded"]
        await world.kill(one)
        again = await world.join(2, quota=2 * LAYER_BYTES, folder=1)
        await trio.sleep(2)
        (shown,) = [w for w in again.health.current() if w.code == "quota-exceeded"]
        assert "take 1.2MB, more than its content.quota of 200kB" in shown.text
        assert "Raise content.quota" in shown.text


async def test_what_becomes_the_last_copy_is_protected_while_another_one_is_fetched(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        one, two = [await world.join(n) for n in (1, 2)]
        world.publish(one)
        await world.until(lambda: min(world.copies()) == 2, SOON)
        two.files.stuck = True
        two.store.remove(world.refs[0].cid)
        await trio.sleep(SOON)  # by now it is being fetched again
        await world.kill(one)
        await trio.sleep(LEASE_S + 2)
        assert {ref.cid for ref in world.refs[1:]} <= two.pinned("mesh-last")


async def test_protection_stays_until_it_is_known_what_the_network_serves(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    """A node that starts has no manifest, or no certificate of the publisher, for a while."""
    async with open_world(rng, tmp_path) as world:
        one = await world.join(1)
        world.publish(one)
        await trio.sleep(2)
        files = {ref.cid for ref in world.refs}
        assert files <= one.pinned("mesh-last")
        await world.kill(one)
        again = await world.join(2, folder=1)  # with records of nothing
        await trio.sleep(30)
        assert again.replication.copies() is None
        assert files <= again.pinned("mesh-last")


async def test_the_manifest_stays_with_everybody(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    """It is small, and without it nobody knows after a restart which files are of the model."""
    async with open_world(rng, tmp_path) as world:
        members = [await world.join(n) for n in (1, 2, 3, 4)]
        world.publish(members[0])
        await world.until(lambda: min(world.copies()) == 2, SOON)
        await trio.sleep(2)
        for member in members:
            assert world.cid in member.pinned("mesh-last")


async def test_a_slow_node_that_gets_on_is_not_stood_in_for(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        members = [await world.join(n) for n in (1, 2, 3, 4, 5)]
        world.fetch_s = 25.0
        world.publish(members[0])
        await world.until(lambda: min(world.copies()) == 2, SETTLE_S + len(world.refs) * 26.0)
        await trio.sleep(60)
        assert sum(len(member.fetched) for member in members) == len(world.refs)


@pytest.mark.parametrize("room", [5, 9])
async def test_nodes_that_want_different_numbers_of_copies_come_to_rest(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path, room: int
) -> None:
    """And so do those whose quota is full: nobody evicts what is fetched again."""
    async with open_world(rng, tmp_path) as world:
        wanted = (1, 3, 2, 4)
        members = [
            await world.join(number, replicas=replicas, quota=(1000 if number == 1 else room) * LAYER_BYTES + 10_000)
            for number, replicas in enumerate(wanted, 1)
        ]
        world.publish(members[0])
        await trio.sleep(300)
        before = [list(member.fetched) for member in members]
        assert any(before)
        await trio.sleep(300)
        assert [member.fetched for member in members] == before
        assert all(len(made) == len(set(made)) for made in before), "nothing was fetched twice"
        assert min(world.copies()) >= 2 or room == 5


async def test_a_mesh_that_stops_as_a_whole_does_not_wait(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        members = [await world.join(n) for n in (1, 2, 3)]
        world.publish(members[0])
        await trio.sleep(2)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(member.replication.drain)
            for member in members[1:]:
                await member.node.stop()
        assert trio.current_time() - began < 5.0, trio.current_time() - began


async def test_a_node_that_nobody_can_relieve_leaves_at_once(
    autojump_clock: MockClock, rng: random.Random, tmp_path: Path
) -> None:
    async with open_world(rng, tmp_path) as world:
        one = await world.join(1)
        await world.join(2, quota=LAYER_BYTES // 2)
        world.publish(one)
        await trio.sleep(2)
        began = trio.current_time()
        await one.replication.drain()
        assert trio.current_time() == began
