"""`meshnode model export` and `import` as a person types them, between two data folders without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from meshnode.core.paths import Paths
from meshnode.publisher.release import release
from meshnode.state import releases
from meshnode.state.database import Database
from meshnode.store.blob_store import BlobStore
from protocols.ids import Cid, peer_id_of
from protocols.manifest.messages import Manifest
from tests.process.mesh_rig import READY_S, mesh_of, meshnode, small_model, tokens_of

pytestmark = [pytest.mark.process]

QUOTA_BYTES = 1 << 30
KEY = SigningKey(bytes(range(32)))


class Place:
    """A data folder that holds a release of two variants, and its export."""

    def __init__(self, folder: Path) -> None:
        published = small_model(folder / "model", layers=4)
        index = json.loads((published / "index.json").read_text())
        (published / "graph8").write_bytes(b"another graph")
        graph = {"path": "graph8", "size": 13}
        index["variants"]["int8"] = {**index["variants"]["int4"], "graph": graph}
        (published / "index.json").write_text(json.dumps(index))
        self.folder = folder / "origin"
        Paths(self.folder).create()
        publisher = peer_id_of(bytes(KEY.verify_key))
        store = BlobStore(Paths(self.folder).content, QUOTA_BYTES)
        try:
            self.cid, self.manifest = release(published, store, KEY, created_ms=1, publisher=publisher)
        finally:
            store.close()
        with Database(Paths(self.folder).state) as database:
            releases.remember(database, self.cid, "int8")
        self.car = folder / "model.car"
        ran = meshnode("model", "export", "small-noise", "--car", self.car, folder=self.folder)
        assert ran.code == 0, ran.errors
        assert self.cid in ran.out and "int4, int8" in ran.out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("car"))


def contents(folder: Path, manifest: Manifest, cid: Cid) -> dict[str, bytes]:
    """CID -> bytes of what a data folder holds of a release."""
    store = BlobStore(Paths(folder).content, QUOTA_BYTES)
    try:
        found = {file: path.read_bytes() for file in manifest.all_files() if (path := store.path(file)) is not None}
        block = store.block(cid)
    finally:
        store.close()
    return {**found, cid: block} if block is not None else dict(found)


def test_files_are_encrypted_before_the_first_start(place: Place, tmp_path: Path) -> None:
    assert meshnode("init", folder=tmp_path).code == 0
    with Paths(tmp_path).config.open("a") as config:
        config.write("\n[content]\nencrypt = true\n")
    ran = meshnode("model", "import", place.car, folder=tmp_path)
    assert ran.code == 0, ran.errors
    files = list((Paths(tmp_path).content / "files").iterdir())
    assert files and {path.suffix for path in files} == {".sealed"}
    assert meshnode("model", "verify", "small-noise", folder=tmp_path).code == 0


def test_from_one_device_to_another(place: Place, tmp_path: Path) -> None:
    assert "No models" in meshnode("model", "list", folder=tmp_path).out
    ran = meshnode("model", "import", place.car, folder=tmp_path)
    assert ran.code == 0, ran.errors
    assert "is here and verified" in ran.out and "as soon as this node starts" in ran.out
    there = contents(place.folder, place.manifest, place.cid)
    assert len(there) == len(place.manifest.all_files()) + 1
    assert contents(tmp_path, place.manifest, place.cid) == there
    verified = meshnode("model", "verify", "small-noise", folder=tmp_path)
    assert verified.code == 0 and f"{len(there) - 1} files are as they were published" in verified.out
    assert place.cid in meshnode("model", "list", folder=tmp_path).out
    with Database(Paths(tmp_path).state) as database:
        waiting = releases.waiting(database)
    assert waiting is not None and waiting[0] == place.cid
    again = tmp_path / "again.car"
    assert meshnode("model", "export", place.cid, "--car", again, folder=tmp_path).code == 0
    assert again.read_bytes() == place.car.read_bytes()


def test_one_variant_and_what_is_missing_then(place: Place, tmp_path: Path) -> None:
    car = tmp_path / "int8.car"
    ran = meshnode("model", "export", "small-noise", "--variant", "int8", "--car", car, folder=place.folder)
    assert ran.code == 0, ran.errors
    data = tmp_path / "data"
    ran = meshnode("model", "import", car, folder=data)
    assert ran.code == 0, ran.errors
    assert "Not in the file, or not whole: int4" in ran.out
    ran = meshnode("model", "export", "small-noise", "--car", tmp_path / "all.car", folder=data)
    assert ran.code == 4
    assert "1 of 9 files" in ran.sentence() and "--variant int8" in ran.errors
    ran = meshnode("model", "export", "small-noise", "--variant", "int2", "--car", tmp_path / "x", folder=data)
    assert "has no variant int2" in ran.sentence()
    ran = meshnode("model", "export", "small-noise", "--variant", "int8", "--car", car, folder=data)
    assert "--force" in ran.sentence()


@pytest.mark.net
def test_a_running_mesh_serves_what_was_carried_to_it(place: Place, tmp_path: Path) -> None:
    with mesh_of(tmp_path, 2, memory=("1GB",)) as mesh:
        ran = meshnode("model", "import", place.car, folder=mesh.members[0].folder)
        assert ran.code == 0, ran.errors
        assert "The network now serves small-noise" in ran.out
        mesh.wait_ready(READY_S)
        assert mesh.members[1].status().model.manifest == place.cid
        assert tokens_of(mesh.members[0]) == tokens_of(mesh.members[1])
