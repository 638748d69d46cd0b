"""A whole model into a real IPFS daemon, js-ipfs, through its RPC, and out of it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from nacl.signing import SigningKey

from meshnode.bench.known import Known, content_of
from meshnode.core.health import Health
from meshnode.ipfs.rpc import IpfsApi
from meshnode.ipfs.source_order import Fallback
from meshnode.model.fit import facts_of, tight_memory
from meshnode.publisher.release import release
from meshnode.store.blob_store import BlobStore
from protocols.ids import Cid, peer_id_of
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import FileRef
from tests.ipfs.test_rpc_js_ipfs import daemon
from tests.ipfs.world import JS_IPFS, NODE
from tests.process.mesh_rig import READY_S, mesh_of, meshnode, serving, small_model, tokens_of
from tests.services.test_content import ME, QUOTA, network

NEEDS = (NODE, JS_IPFS)
pytestmark = [pytest.mark.ipfs, pytest.mark.slow]


async def test_a_published_model_goes_there_and_a_node_without_peers_gets_all_of_it(tmp_path: Path) -> None:
    """64 MiB in 24 layers, and not one block by Bitswap."""
    key = SigningKey.generate()
    published = small_model(tmp_path / "model", layer_bytes=64 * (1 << 20) // 24)
    store = BlobStore(tmp_path / "ours", QUOTA)
    cid, manifest = release(published, store, key, created_ms=1, publisher=peer_id_of(bytes(key.verify_key)))
    health = Health()
    async with daemon(tmp_path / "daemon") as (address, _):
        there = IpfsApi(address, health)
        for ref in manifest.files_of(*manifest.variants):
            path = store.path(ref.cid)
            assert path is not None and await there.add(path) == ref.cid
        block = store.block(cid)
        assert block is not None
        await there.put(block, cid)
        await there.pin(cid)  # walks the whole of it
        async with network(tmp_path) as net:
            outside = Fallback([there])
            host, folder = net.host(ME), tmp_path / "reader"
            mine = content_of(host, BlobStore(folder, QUOTA), Known(host), outside=outside)
            await net.nursery.start(mine.run)
            fetched = open_manifest(await mine.block(cid))
            assert fetched == manifest

            async def compare(file: FileRef) -> None:
                there, here = await mine.open(file), store.path(file.cid)
                assert here is not None and there.path.read_bytes() == here.read_bytes()

            async with trio.open_nursery() as nursery:
                for file in fetched.files_of(*fetched.variants):
                    nursery.start_soon(compare, file)
            assert mine.bytes_fetched == 0
    store.close()
    assert health.current() == []


@pytest.mark.long
async def test_a_mesh_publishes_there_and_another_starts_from_the_manifest_and_the_daemon(tmp_path: Path) -> None:
    async with daemon(tmp_path / "daemon") as (address, _):
        there = IpfsApi(address, Health())
        settings = (("content.ipfs_api", address),)
        model = small_model(tmp_path / "model", layers=8)
        with mesh_of(
            tmp_path / "first", 3, published=model, settings=(*settings, ("content.ipfs_publish", True))
        ) as first:
            answer = await trio.to_thread.run_sync(tokens_of, first.members[0])
            manifest = Cid((await trio.to_thread.run_sync(first.members[0].status)).model.manifest)
            with trio.fail_after(120):
                while not await there.pinned(manifest, recursive=False):  # noqa: ASYNC110 - no event tells it
                    await trio.sleep(0.1)
                released = open_manifest(await there.block(manifest))
                for file in released.all_files():
                    while not await there.pinned(file):  # noqa: ASYNC110 - as above
                        await trio.sleep(0.1)
        memory = str(tight_memory(facts_of(released, "int4"), 3))
        with mesh_of(tmp_path / "second", 3, memory=(memory,), settings=settings) as second:
            ran = await trio.to_thread.run_sync(
                lambda: meshnode("model", "add", manifest, folder=second.members[0].folder)
            )
            assert ran.code == 0, ran.errors
            await trio.to_thread.run_sync(second.wait_ready, READY_S)
            for member in second.members:
                assert await trio.to_thread.run_sync(tokens_of, member) == answer
            assert len(serving(await trio.to_thread.run_sync(second.members[0].status))) == 3
