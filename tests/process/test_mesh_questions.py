"""Damage in the store of a node that runs: one sentence, and it goes on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from meshnode.core.paths import Paths
from meshnode.harness.member import Member
from meshnode.harness.mesh import QUOTA_BYTES, Mesh
from meshnode.state import releases
from meshnode.state.database import Database
from meshnode.store.blob_store import BlobStore
from protocols.ids import DAG_CBOR, Cid
from tests.process.mesh_rig import READY_S, mesh_of, meshnode, small_model

pytestmark = [pytest.mark.net, pytest.mark.process]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("questions")
    with mesh_of(folder, 1, published=small_model(folder / "model"), memory=("1GB",)) as mesh:
        yield mesh


@pytest.fixture
def node(mesh: Mesh) -> Member:
    return mesh.members[0]


def test_a_damaged_file(node: Member) -> None:
    """A bit that flips on the disk changes no time stamp; an editor does. A running node notices that one, too."""
    assert meshnode("model", "verify", "small-noise", folder=node.folder).code == 0
    files = sorted((Paths(node.folder).content / "files").iterdir(), key=lambda file: file.stat().st_size)
    silent, edited = files[-1], files[-2]
    before = silent.stat()
    for path in (silent, edited):
        path.chmod(0o600)
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data)
    os.utime(silent, ns=(before.st_atime_ns, before.st_mtime_ns))
    sentence = meshnode("model", "verify", "small-noise", folder=node.folder).sentence()
    assert f"({silent.name}) was damaged" in sentence
    assert re.search(rf"\({edited.name}\) (was damaged|is missing)", sentence)
    assert "layer." in sentence and "meshnode model add" in sentence
    assert not silent.exists() or silent.stat().st_ino != before.st_ino, "it is removed"


def test_a_manifest_with_a_bad_signature(mesh: Mesh, node: Member) -> None:
    manifest = Cid(node.status().model.manifest)
    store = BlobStore(Paths(node.folder).content, QUOTA_BYTES)
    try:
        block = store.block(manifest)
        assert block is not None
        forged = bytearray(block)
        forged[block.index(b"small-noise")] ^= 1
        cid = store.put_block(bytes(forged), DAG_CBOR)
    finally:
        store.close()
    with Database(Paths(node.folder).state) as database:
        releases.remember(database, cid, "int4")
    for action in ("show", "verify", "serve"):
        assert "signature" in meshnode("model", action, cid, folder=node.folder).sentence()
    listed = meshnode("model", "list", folder=node.folder)
    assert listed.code == 0
    assert "small-noise" in listed.out
    assert cid in listed.errors

    node.stop()
    node.wait_stopped()
    with Database(Paths(node.folder).state) as database:
        releases.serve_later(database, cid, "int4")
    mesh.up()
    status = node.wait_for(lambda s: s.model is not None, READY_S, "finding the model again")
    assert status.model.manifest == manifest, "the forged one is not served, and hinders nothing"
