"""A running mesh and real IPFS nodes that are no members: a whole model goes there, and starts other meshes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

from meshnode.core.paths import Paths
from meshnode.harness.member import Member
from meshnode.harness.mesh import QUOTA_BYTES
from meshnode.model.fit import facts_of, tight_memory
from meshnode.store.blob_store import BlobStore
from protocols.ids import DAG_CBOR, Cid
from protocols.manifest.codec import open_manifest
from protocols.unixfs.builder import file_cid
from tests.ipfs.world import HELIA, LIBRARY, NODE, Guest, helia, kubo
from tests.process.mesh_rig import LAYERS, READY_S, mesh_of, meshnode, serving, small_model, tokens_of

NEEDS = (LIBRARY, NODE, HELIA)
pytestmark = [pytest.mark.ipfs, pytest.mark.slow]


def leave_only(member: Member, manifest: Cid) -> None:
    """Empty a stopped node's store of everything but the manifest."""
    folder = Paths(member.folder).content
    store = BlobStore(folder, QUOTA_BYTES)
    block = store.block(manifest)
    store.close()
    assert block is not None
    shutil.rmtree(folder)
    store = BlobStore(folder, QUOTA_BYTES)
    store.put_block(block, DAG_CBOR)
    assert store.files() == {manifest}
    store.close()


async def test_a_model_goes_to_kubo_and_a_mesh_starts_from_its_manifest_and_kubo(tmp_path: Path) -> None:
    published = small_model(tmp_path / "model", layer_bytes=1 << 20)
    async with kubo(tmp_path / "kubo") as there:
        settings = (("content.ipfs_peers", there.addresses[0]), ("content.share", "guests"))
        with mesh_of(tmp_path, 3, published=published, settings=settings) as mesh:
            first = mesh.members[0]
            answer = await trio.to_thread.run_sync(tokens_of, first)
            status = await trio.to_thread.run_sync(first.status)
            for file in published.iterdir():
                if file.name != "index.json":
                    data = file.read_bytes()
                    assert await there.get(file_cid(data), tmp_path / "copy") == data
            await trio.to_thread.run_sync(mesh.down)
            for member in mesh.members:
                leave_only(member, Cid(status.model.manifest))
            await trio.to_thread.run_sync(mesh.up)
            await trio.to_thread.run_sync(mesh.wait_ready, READY_S)
            fetched = 0
            for member in mesh.members:
                assert await trio.to_thread.run_sync(tokens_of, member) == answer
                status = await trio.to_thread.run_sync(member.status)
                assert status.refusals == () and there.peer not in status.unreachable
                fetched += status.content.fetched_bytes
            assert fetched >= LAYERS << 20


async def published_to(there: Guest, folder: Path) -> tuple[Cid, str, list[int]]:
    """A mesh publishes a model, the guest pins its manifest, and the mesh is gone for good.

    Gives the manifest's CID, the memory that a node of three needs for its share, and an answer of the mesh.
    """
    published = small_model(folder / "model", layer_bytes=1 << 20)
    settings = (("content.ipfs_peers", there.addresses[0]), ("content.share", "guests"))
    with mesh_of(folder, 3, published=published, settings=settings) as mesh:
        answer = await trio.to_thread.run_sync(tokens_of, mesh.members[0])
        status = await trio.to_thread.run_sync(mesh.members[0].status)
        manifest = Cid(status.model.manifest)
        await there.call("pin", manifest)
        store = BlobStore(Paths(mesh.members[0].folder).content, QUOTA_BYTES)
        block = store.block(manifest)
        store.close()
        assert block is not None
    await trio.to_thread.run_sync(shutil.rmtree, folder)
    return manifest, str(tight_memory(facts_of(open_manifest(block), "int4"), 3)), answer


@pytest.mark.parametrize(
    ("kind", "running"), [("Kubo", False), ("Helia", True)], ids=["Kubo, before the start", "Helia, while it runs"]
)
async def test_three_nodes_start_from_a_manifest_cid_and_an_ipfs_node(
    tmp_path: Path, kind: str, running: bool
) -> None:
    """Another network, empty nodes, one address and one CID."""
    async with kubo(tmp_path / "kubo") if kind == "Kubo" else helia() as there:
        manifest, memory, answer = await published_to(there, tmp_path / "first")
        settings = (("content.ipfs_peers", there.addresses[0]),)
        with mesh_of(tmp_path / "second", 3, memory=(memory,), settings=settings) as mesh:
            if not running:
                await trio.to_thread.run_sync(mesh.down)
            ran = await trio.to_thread.run_sync(
                lambda: meshnode("model", "add", f"ipfs://{manifest}", folder=mesh.members[1].folder)
            )
            assert ran.code == 0, ran.errors
            if not running:
                await trio.to_thread.run_sync(mesh.up)
            await trio.to_thread.run_sync(mesh.wait_ready, READY_S)
            for member in mesh.members:
                assert await trio.to_thread.run_sync(tokens_of, member) == answer
            status = await trio.to_thread.run_sync(mesh.members[0].status)
            assert status.model.manifest == manifest
            assert len(serving(status)) == 3
