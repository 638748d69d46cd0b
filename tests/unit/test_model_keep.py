"""`meshnode model remove` on a folder without a running node."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.cli.main import main
from meshnode.cli.model_keep import remove_model
from meshnode.core.paths import Paths
from meshnode.state import releases
from meshnode.state.database import Database
from meshnode.store.blob_store import BlobStore
from protocols.ids import DAG_CBOR, Cid
from protocols.manifest.messages import FileRef, Manifest
from tests.manifests import block_of, manifest_of

QUOTA = 1 << 30


def published(folder: Path, version: str, head: bytes) -> tuple[Cid, Manifest]:
    """A release whose files are those of every other one, but for the head."""
    store = BlobStore(Paths(folder).content, QUOTA)

    def file(name: str) -> FileRef:
        path = folder / "source"
        path.write_bytes(head if name == "head" else name.encode())
        return FileRef(cid=store.add_file(path, pin="publishing"), size=path.stat().st_size)

    manifest = replace(manifest_of(file, layers=4), version=version, created_ms=int(version[1]))
    cid = store.put_block(block_of(manifest), DAG_CBOR)
    for one in (cid, *manifest.all_files()):
        store.pin(one, cid)
    store.unpin("publishing")
    store.close()
    with Database(Paths(folder).state) as database:
        releases.remember(database, cid, "int4")
    return cid, manifest


def test_what_another_release_has_too_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Paths(tmp_path).create()
    old_cid, old = published(tmp_path, "v1.0.0-0", b"head")
    new_cid, new = published(tmp_path, "v2.0.0-0", b"another head")
    assert remove_model(argparse.Namespace(folder=tmp_path, model=old_cid, force=False)) == 0
    store = BlobStore(Paths(tmp_path).content, QUOTA)
    assert store.files() == {new_cid, *new.all_files()}
    assert store.pins() == {new_cid: {new_cid, *new.all_files()}}, "and protected as before"
    assert store.path(old.variants["int4"].head.cid) is None
    store.close()
    assert "tiny v1.0.0-0 is removed" in capsys.readouterr().out


def test_a_pinned_model_is_listed_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Paths(tmp_path).create()
    cid, _ = published(tmp_path, "v1.0.0-0", b"head")
    words = ["--data", str(tmp_path)]
    assert main(["model", "list", *words]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"{cid}  pinned")
    assert main(["model", "unpin", "tiny", *words]) == 0
    assert main(["model", "list", *words]) == 0
    assert capsys.readouterr().out.rstrip().endswith(cid)


def test_verify_names_what_was_damaged_and_removes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Paths(tmp_path).create()
    _, manifest = published(tmp_path, "v1.0.0-0", b"head")
    words = ["model", "verify", "tiny", "--data", str(tmp_path)]
    assert main(words) == 0
    assert "8 files are as they were published." in capsys.readouterr().out
    layer, graph = manifest.variants["int4"].layers[2].cid, manifest.variants["int4"].graph.cid
    folder = Paths(tmp_path).content / "files"
    (folder / layer).chmod(0o600)
    with (folder / layer).open("r+b") as file:
        file.write(b"four")
    (folder / graph).unlink()
    assert main(words) == 4
    said = capsys.readouterr().err
    assert f"layer.2 ({layer}) was damaged" in said
    assert f"graph ({graph}) is missing" in said
    assert "meshnode model import" in said
    assert not (folder / layer).exists()
