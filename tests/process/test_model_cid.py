"""`meshnode model add CID`, with the real command line; with real IPFS nodes in tests/ipfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.core.paths import Paths
from meshnode.harness.mesh import QUOTA_BYTES
from meshnode.state import releases
from meshnode.state.database import Database
from meshnode.store.blob_store import BlobStore
from protocols.ids import DAG_CBOR, RAW, cid_of
from tests.process.mesh_rig import meshnode

pytestmark = pytest.mark.process

NOWHERE = cid_of(DAG_CBOR, b"nobody has this")


def test_it_waits_for_the_node_to_start(tmp_path: Path) -> None:
    for source, variant in ((NOWHERE, "int8"), (f"/ipfs/{NOWHERE}", "int4")):
        ran = meshnode("model", "add", source, "--variant", variant, folder=tmp_path)
        assert ran.code == 0, ran.errors
        assert "as soon as this node starts" in ran.out and "content.ipfs_peers" in ran.out
        with Database(Paths(tmp_path).state) as database:
            assert releases.waiting(database) == (NOWHERE, variant)


def test_what_can_not_be_meant(tmp_path: Path) -> None:
    sentence = meshnode("model", "add", cid_of(RAW, b"file"), folder=tmp_path).sentence()
    assert "CID of a file" in sentence
    assert "keeps the name" in meshnode("model", "add", NOWHERE, "--name", "mine", folder=tmp_path).sentence()
    twice = meshnode("model", "add", NOWHERE, "--variant", "int4", "--variant", "int8", folder=tmp_path)
    assert "one variant" in twice.sentence()
    store = BlobStore(Paths(tmp_path).content, QUOTA_BYTES)
    try:
        odd = store.put_block(b"\xa0", DAG_CBOR)
    finally:
        store.close()
    assert "is not the manifest" in meshnode("model", "add", odd, folder=tmp_path).sentence()
