"""A running mesh and a real Kubo that is no member: a whole model goes there, and comes back to empty nodes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

from meshnode.content.blob_store import BlobStore
from meshnode.core.paths import Paths
from meshnode.harness.member import Member
from meshnode.harness.mesh import QUOTA_BYTES
from protocols.ids import DAG_CBOR, Cid
from protocols.unixfs.builder import file_cid
from tests.ipfs.world import kubo
from tests.process.mesh_rig import LAYERS, READY_SECONDS, mesh_of, small_model, tokens_of

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
                leave_only(member, Cid(status["model"]["manifest"]))
            await trio.to_thread.run_sync(mesh.up)
            await trio.to_thread.run_sync(mesh.wait_ready, READY_SECONDS)
            fetched = 0
            for member in mesh.members:
                assert await trio.to_thread.run_sync(tokens_of, member) == answer
                status = await trio.to_thread.run_sync(member.status)
                assert status["refusals"] == [] and there.peer not in status["unreachable"]
                fetched += status["content"]["fetched_bytes"]
            assert fetched >= LAYERS << 20
