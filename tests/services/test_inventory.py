"""What a node says that it holds: right, and never more than an advert can carry."""

from __future__ import annotations

import random
from typing import cast

import trio
from trio.testing import MockClock

from meshnode.services.inventory import InventoryService
from meshnode.store.port import Content, StoreUsage
from protocols.ids import DAG_CBOR, RAW, Cid, cid_of, cid_to_bytes
from protocols.manifest.messages import FileRef, Manifest
from tests.manifests import block_of, manifest_of
from tests.services.directory_mesh import open_mesh

LAYERS = 900


def release_of(name: str) -> Manifest:
    """Two variants, more files than an advert can name."""

    def file(which: str) -> FileRef:
        return FileRef(cid=cid_of(RAW, f"{name} {which}".encode()), size=1)

    return manifest_of(file, layers=LAYERS, name=name, variants=("int4", "int8"))


class FullStore:
    """Has every file of these releases, and their manifests."""

    def __init__(self, *releases: Manifest) -> None:
        self.manifests = {cid_of(DAG_CBOR, block_of(release)): block_of(release) for release in releases}
        self.held = frozenset(self.manifests).union(*(release.all_files() for release in releases))

    def files(self) -> frozenset[Cid]:
        return self.held

    def block(self, cid: Cid) -> bytes | None:
        return self.manifests.get(cid)

    def version(self) -> int:
        return 1

    def usage(self) -> StoreUsage:
        return StoreUsage(used_bytes=0, quota_bytes=100, free_disk_bytes=100, room_bytes=100)


async def test_of_too_many_files_those_of_the_served_variant_are_named(
    nursery: trio.Nursery, autojump_clock: MockClock, rng: random.Random
) -> None:
    old, new = release_of("old"), release_of("new")
    full = FullStore(old, new)
    store = cast(Content, full)
    async with open_mesh(rng) as mesh:
        one = await mesh.start(1, roles=("serve", "publish"))
        two = await mesh.start(2, roles=("serve", "publish"))
        await mesh.full(one, two)
        for node, release in ((two, old), (one, new)):
            cid = cid_of(DAG_CBOR, block_of(release))
            node.directory.announce(name=release.name, version="v1.0.0-0", manifest=cid, variant="int4")
            await one.until(
                lambda directory, cid=cid: any(h.manifest == cid for h in directory.announcements().values()), 5
            )
        inventory = InventoryService(one.directory, store, one.health)
        inventory.serve((cid_of(DAG_CBOR, block_of(new)), "int4"))
        nursery.start_soon(inventory.run)

        def named() -> set[bytes]:
            return {cid for holding in two.directory.live()[one.peer].holdings for cid in holding.cids}

        await two.until(lambda _: named(), 5)
        assert {cid_to_bytes(ref.cid) for ref in new.files_of("int4")} <= named()
        assert len(named()) > 1100, "and of others as many as there is room for"
        said = {cid for holding in inventory.holdings() for cid in holding.cids}
        assert said == {cid_to_bytes(cid) for cid in full.held}, "here, all of them count"
