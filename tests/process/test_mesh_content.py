"""A model on its way: a provider with a damaged disk, and a node that dies in the middle of its transfer."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from meshnode.api.messages import Status
from meshnode.core.paths import Paths
from meshnode.harness.member import Member
from meshnode.harness.mesh import QUOTA_BYTES
from meshnode.store.blob_store import BlobStore
from protocols.ids import DAG_CBOR, Cid, short
from tests.process.mesh_rig import LAYERS, NO_COPIES, READY_SECONDS, mesh_of, serving, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

NULL = (("serve.engine", "null"), *NO_COPIES)


def hashes(folder: Path) -> set[bytes]:
    return {hashlib.sha256(file.read_bytes()).digest() for file in folder.iterdir() if file.name != "index.json"}


def files_of(member: Member) -> Path:
    return Paths(member.folder).content / "files"


def give(member: Member, manifest: bytes, published: Path) -> None:
    """Put a whole release into the store of a node that does not run."""
    store = BlobStore(Paths(member.folder).content, QUOTA_BYTES)
    try:
        store.put_block(manifest, DAG_CBOR)
        for file in published.iterdir():
            if file.name != "index.json":
                store.add_file(file, pin="test")
    finally:
        store.close()


def damage(folder: Path) -> None:
    """Flip a bit in every file that is large, as a failing disk does: no time stamp tells."""
    for path in folder.iterdir():
        before = path.stat()
        if before.st_size > 100_000:
            data = bytearray(path.read_bytes())
            data[1000] ^= 1
            path.unlink()  # it may be a link to the published file
            path.write_bytes(data)
            path.chmod(before.st_mode)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def manifest_of(member: Member, cid: str) -> bytes:
    store = BlobStore(Paths(member.folder).content, QUOTA_BYTES)
    try:
        block = store.block(Cid(cid))
    finally:
        store.close()
    assert block is not None
    return block


def test_a_provider_with_a_damaged_disk(tmp_path: Path) -> None:
    """It is dropped and named; what it sent is not believed, and the next provider gives all."""
    published = small_model(tmp_path / "model", layer_bytes=1 << 20)
    right = hashes(published)
    with mesh_of(tmp_path, 3, published=published, memory=("0",), wait=False, settings=NO_COPIES) as mesh:
        bad, good, third = mesh.members
        for member in mesh.members:
            status = member.wait_for(lambda s: s.model is not None, READY_SECONDS, "the manifest")
        mesh.down()
        give(good, manifest_of(bad, status.model.manifest), published)
        damage(files_of(bad))
        assert hashes(files_of(good)) == right == hashes(published)
        config = Paths(third.folder).config
        config.write_text(config.read_text().replace('memory = "0"', 'memory = "1GB"'))

        for member in (bad, third):
            member.launch()
            member.wait_answers()
        status = third.wait_for(lambda s: s.content.bad_providers, READY_SECONDS, "a bad block")
        assert list(status.content.bad_providers) == [bad.peer_id]
        print(f"\n{status.content.bad_providers[bad.peer_id]}")
        status = third.wait_for(
            lambda s: any(entry.code == "bad-provider" for entry in s.health), READY_SECONDS, "its name"
        )
        [entry] = [entry for entry in status.health if entry.code == "bad-provider"]
        assert short(bad.peer_id) in entry.text and "meshnode model verify" in entry.text
        assert not status.ready
        mesh.up()
        third.wait_ready(READY_SECONDS)
        status = third.status()
        assert serving(status)[third.peer_id] == (0, LAYERS)
        assert list(status.content.bad_providers) == [bad.peer_id]
        assert hashes(files_of(third)) <= right
        assert len(tokens_of(bad)) == 12


def test_a_transfer_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    published = small_model(tmp_path / "model", layer_bytes=6 << 20)
    size = sum(
        file.stat().st_size for file in published.iterdir() if file.name.startswith(("layer", "graph", "head"))
    )
    with mesh_of(tmp_path, 1, published=published, memory=("0",), wait=False, settings=NO_COPIES) as mesh:
        provider = mesh.members[0]
        fetcher = mesh.add("1GB", NULL)

        def half(status: Status) -> bool:
            return status.progress is not None and status.progress.bytes_done >= size // 2

        fetcher.wait_for(half, READY_SECONDS, "half of the transfer")
        fetcher.signal(signal.SIGKILL)
        fetcher.wait_stopped()
        before = provider.status().content.served_bytes
        assert 0.4 * size < before < 0.9 * size
        mesh.up()
        fetcher.wait_ready(READY_SECONDS)
        again = fetcher.status().content.fetched_bytes
        print(f"\n{before / 1e6:.0f} MB before, {again / 1e6:.0f} MB after the kill, of {size / 1e6:.0f} MB")
        assert before + again <= 1.1 * size
        assert hashes(files_of(fetcher)) <= hashes(published)
        assert serving(fetcher.status())[fetcher.peer_id] == (0, LAYERS)
