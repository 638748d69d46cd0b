"""The demonstration model: three empty nodes, the CID of its manifest and a Kubo that is no member; they answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

from meshnode.core.paths import Paths
from meshnode.harness.mesh import QUOTA_BYTES
from meshnode.model.fit import facts_of, tight_memory
from meshnode.store.blob_store import BlobStore
from meshnode.text.question import question
from protocols.ids import Cid
from protocols.manifest.codec import open_manifest
from tests.ipfs.world import LIBRARY, kubo
from tests.model.real_mesh import LAYERS, model_folder
from tests.process.mesh_rig import mesh_of, meshnode, serving, tokens_of

NEEDS = (LIBRARY,)
pytestmark = [pytest.mark.ipfs, pytest.mark.slow]

ASK = question("Why is the sky blue?", {"max_tokens": 24, "temperature": 0})
READY_S = 120.0
REAL = ("serve.engine", "onnx")


@pytest.mark.long
async def test_the_real_model_answers_out_of_kubo(tmp_path: Path) -> None:
    published = await trio.to_thread.run_sync(model_folder, "int4")
    async with kubo(tmp_path / "kubo") as there:
        address = there.addresses[0]
        first, second = tmp_path / "first", tmp_path / "second"
        settings = (REAL, ("content.ipfs_peers", address), ("content.share", "guests"))
        with mesh_of(first, 1, published=published, memory=("1GB",), settings=settings) as mesh:
            (publisher,) = mesh.members
            right = await trio.to_thread.run_sync(tokens_of, publisher, ASK)
            status = await trio.to_thread.run_sync(publisher.status)
            manifest = Cid(status.model.manifest)
            assert await there.call("pin", manifest) == 0
            store = BlobStore(Paths(publisher.folder).content, QUOTA_BYTES)
            block = store.block(manifest)
            store.close()
            assert block is not None
            memory = str(tight_memory(facts_of(open_manifest(block), "int4"), 3))
        await trio.to_thread.run_sync(shutil.rmtree, first)
        with mesh_of(second, 3, memory=(memory,), settings=(REAL, ("content.ipfs_peers", address))) as mesh:
            ran = await trio.to_thread.run_sync(
                lambda: meshnode("model", "add", manifest, folder=mesh.members[0].folder)
            )
            assert ran.code == 0, ran.errors
            await trio.to_thread.run_sync(mesh.wait_ready, READY_S)
            for member in mesh.members:
                assert await trio.to_thread.run_sync(tokens_of, member, ASK) == right
            status = await trio.to_thread.run_sync(mesh.members[0].status)
            spans = serving(status)
            assert len(spans) == 3
            assert {layer for span in spans.values() for layer in range(*span)} == set(range(LAYERS))
            assert len(right) == ASK.max_tokens
