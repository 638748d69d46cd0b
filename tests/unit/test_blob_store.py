"""The content folder: adding, serving, fetching with interruptions, quota, pins, several processes, damage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from meshnode.core.errors import Declined, DiskError, ModelError
from meshnode.store import eviction
from meshnode.store.blob_store import BlobStore
from meshnode.store.partial import PartialFile
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, cid_matches, cid_to_bytes
from protocols.unixfs.builder import file_cid
from tests.trees import blocks_of, noise, tree_of

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    opened = BlobStore(tmp_path / "content", 100 * MIB, wall=count(1001).__next__)
    yield opened
    opened.close()


def source(tmp_path: Path, data: bytes, name: str = "source") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def fetch(store: BlobStore, data: bytes, *, blocks: int | None = None, **shape: Any) -> PartialFile | Path:
    """Write blocks into a partial file, at most `blocks` of them; the path when it is complete."""
    have = blocks_of(data, **shape)
    partial = store.open_partial(tree_of(data, **shape).root, len(data))
    if isinstance(partial, Path):
        return partial
    while not partial.complete and (blocks is None or blocks > 0):
        cid = next(iter(partial.wanted()))
        assert partial.wanted()[cid] >= len(have[cid])
        partial.write([(cid, have[cid])])
        blocks = None if blocks is None else blocks - 1
    return partial.finish() if partial.complete else partial


def begun(store: BlobStore, data: bytes, blocks: int) -> PartialFile:
    partial = fetch(store, data, blocks=blocks)
    assert isinstance(partial, PartialFile)
    return partial


def fetched(store: BlobStore, data: bytes) -> Path:
    path = fetch(store, data)
    assert isinstance(path, Path) and path.read_bytes() == data
    return path


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1, 3 * MIB + 5])
def test_add_gives_the_cid_and_serves_every_block(store: BlobStore, tmp_path: Path, size: int) -> None:
    data = noise(size)
    cid = store.add_file(source(tmp_path, data), pin="model")
    assert cid == file_cid(data)
    path = store.path(cid)
    assert path is not None and path.read_bytes() == data
    assert not path.stat().st_mode & 0o222
    for name, block in blocks_of(data).items():
        assert store.block_size(name) == len(block)
        assert store.read_blocks([name]) == [block]
    assert store.files() == {cid}
    assert store.usage().used_bytes == size
    assert list((store.folder / "tmp").iterdir()) == []


def test_a_read_only_source_is_linked_and_a_writable_one_copied(store: BlobStore, tmp_path: Path) -> None:
    frozen = source(tmp_path, noise(5, 1), "frozen")
    frozen.chmod(0o444)
    linked = store.path(store.add_file(frozen, pin="a"))
    writable = source(tmp_path, noise(5, 2), "writable")
    copied = store.path(store.add_file(writable, pin="a"))
    assert linked is not None and linked.stat().st_ino == frozen.stat().st_ino
    assert copied is not None and copied.stat().st_ino != writable.stat().st_ino


def test_adding_twice_keeps_one_file(store: BlobStore, tmp_path: Path) -> None:
    data = noise(2 * MIB)
    first = store.add_file(source(tmp_path, data), pin="a")
    assert store.add_file(source(tmp_path, data, "again"), pin="b") == first
    assert store.usage().used_bytes == len(data)
    assert store.pins() == {"a": {first}, "b": {first}}


def test_unreadable_source_is_the_persons_mistake(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"can't read .*missing"):
        store.add_file(tmp_path / "missing", pin="a")
    with pytest.raises(ModelError, match="can't read"):
        store.add_file(tmp_path, pin="a")


def test_standalone_blocks(store: BlobStore) -> None:
    cid = store.put_block(b"\xa1aa\x01", DAG_CBOR)
    assert store.put_block(b"\xa1aa\x01", DAG_CBOR) == cid
    assert store.block(cid) == b"\xa1aa\x01"
    assert cid in store.files()
    store.remove(cid)
    assert store.block(cid) is None


def test_fetch_writes_a_whole_file(store: BlobStore) -> None:
    data = noise(3 * MIB + 5)
    path = fetched(store, data)
    assert store.path(file_cid(data)) == path
    assert list(store.folder.glob("files/*.part")) == []
    assert isinstance(store.open_partial(file_cid(data), len(data)), Path)


def test_blocks_of_a_partial_file_are_served(store: BlobStore) -> None:
    data = noise(4 * MIB)
    partial = begun(store, data, blocks=3)
    served = [name for name in blocks_of(data) if store.block_size(name) is not None]
    assert len(served) == 3  # the root and two leaves
    for name in served:
        assert store.read_blocks([name])[0] == blocks_of(data)[name]
    assert store.path(file_cid(data)) is None
    partial.close()


def test_equal_chunks_are_written_to_every_place(store: BlobStore) -> None:
    data = bytes(5 * MIB + 7)
    fetched(store, data)


def test_blocks_that_another_file_has_are_not_fetched(store: BlobStore, tmp_path: Path) -> None:
    shared = noise(2 * MIB)
    store.add_file(source(tmp_path, shared), pin="a")
    data = shared + noise(MIB, 7)
    partial = begun(store, data, blocks=0)
    root = cid_to_bytes(file_cid(data))
    assert list(partial.write([(root, blocks_of(data)[root])])) == [cid_to_bytes(file_cid(data[2 * MIB :]))]
    assert partial.done_bytes == 2 * MIB
    partial.close()


def test_a_closed_fetch_goes_on_where_it_stopped(store: BlobStore) -> None:
    data = noise(6 * MIB)
    partial = begun(store, data, blocks=4)
    partial.close()
    again = begun(store, data, blocks=0)
    assert again.done_bytes == 3 * MIB
    assert len(again.wanted()) == 3
    again.close()
    fetched(store, data)


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "deleted"])
def test_a_damaged_part_is_found_out(store: BlobStore, damage: str) -> None:
    data = noise(6 * MIB)
    partial = begun(store, data, blocks=5)
    partial.close()
    (part,) = store.folder.glob("files/*.part")
    if damage == "truncated":
        os.truncate(part, MIB + MIB // 2)
    elif damage == "overwritten":
        with part.open("r+b") as file:
            file.seek(MIB + 17)
            file.write(b"oops")
    else:
        part.unlink()
    again = begun(store, data, blocks=0)
    assert again.done_bytes == {"truncated": MIB, "overwritten": 3 * MIB, "deleted": 0}[damage]
    again.close()
    fetched(store, data)


def test_kill_at_any_block_loses_at_most_that_block(tmp_path: Path) -> None:
    """A child writes blocks and kills itself without any clean-up; the folder goes on from there."""
    data = noise(5 * MIB)
    (tmp_path / "data").write_bytes(data)
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from meshnode.store.blob_store import BlobStore
        from tests.unit.test_blob_store import fetch
        fetch(BlobStore(Path(sys.argv[1]), 1 << 30), Path(sys.argv[2]).read_bytes(), blocks=4)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "content"), str(tmp_path / "data")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60, check=False)
    assert done.returncode == -9
    store = BlobStore(tmp_path / "content", 1 << 30)
    partial = begun(store, data, blocks=0)
    assert partial.done_bytes == 3 * MIB
    partial.close()
    store.close()


def test_only_one_process_fetches_a_file(store: BlobStore) -> None:
    data = noise(2 * MIB)
    partial = begun(store, data, blocks=1)
    other = BlobStore(store.folder, 100 * MIB)
    with pytest.raises(Declined, match="another process"):
        other.open_partial(file_cid(data), len(data))
    partial.close()
    fetched(other, data)
    assert store.path(file_cid(data)) is not None
    other.close()


def test_another_process_sees_what_was_added(store: BlobStore, tmp_path: Path) -> None:
    other = BlobStore(store.folder, 100 * MIB)
    cid = other.add_file(source(tmp_path, noise(MIB + 3)), pin="cli")
    assert store.path(cid) is not None
    assert store.pins() == {"cli": {cid}}
    other.close()


def test_a_wrong_size_is_refused_with_a_sentence(store: BlobStore) -> None:
    data = noise(3 * MIB)
    cid, root = file_cid(data), cid_to_bytes(file_cid(data))
    partial = store.open_partial(cid, len(data) + 1)
    assert isinstance(partial, PartialFile)
    with pytest.raises(ModelError, match="can't be fetched"):
        partial.write([(root, blocks_of(data)[root])])
    partial.close()
    with pytest.raises(ModelError):
        store.open_partial(file_cid(b"one block"), 5 * MIB)
    assert store.usage().used_bytes == len(data) + 1  # what is being fetched is reserved
    fetched(store, data)


def test_least_recently_used_goes_first_and_pins_stay(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "content", 4 * MIB, wall=count(1001).__next__)
    files = [noise(MIB, seed) for seed in range(6)]
    cids = [store.add_file(source(tmp_path, data), pin=f"p{i}") for i, data in enumerate(files[:4])]
    for name in ("p1", "p2", "p3"):
        store.unpin(name)
    assert store.path(cids[1]) is not None  # used: 2 is the oldest unpinned now
    store.add_file(source(tmp_path, files[4]), pin="p4")
    assert [store.path(cid) is not None for cid in cids] == [True, True, False, True]
    store.add_file(source(tmp_path, files[5]), pin="p5")
    assert sum(store.path(cid) is not None for cid in cids) == 2
    assert store.path(cids[0]) is not None
    assert store.usage().used_bytes <= 4 * MIB
    store.close()


def test_full_quota_is_a_sentence(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "content", 3 * MIB)
    cid = store.add_file(source(tmp_path, noise(2 * MIB)), pin="keep")
    for attempt in (
        lambda: store.add_file(source(tmp_path, noise(2 * MIB, 1), "b"), pin="x"),
        lambda: store.open_partial(file_cid(noise(2 * MIB, 1)), 2 * MIB),
    ):
        with pytest.raises(DiskError, match=r"quota.*raise content\.quota"):
            attempt()
    assert store.path(cid) is not None
    assert list(store.folder.glob("files/*.part")) == [] or store.usage().used_bytes == 2 * MIB
    store.close()


def test_where_room_can_not_be_made_nothing_is_evicted(tmp_path: Path) -> None:
    """What the index lists is advertised, and others give up their copies for it."""
    store = BlobStore(tmp_path / "content", 10 * MIB)
    for seed, pin in enumerate(("", "mesh-spare", "mesh-last")):
        (tmp_path / str(seed)).write_bytes(noise(3 * MIB, seed))
        cid = store.add_file(tmp_path / str(seed), pin=pin or "for a moment")
        if not pin:
            store.unpin("for a moment")
        assert store.path(cid) is not None
    before = store.files()
    with pytest.raises(DiskError, match=r"3.15 MB of its quota of 10.5 MB"):
        store.open_partial(file_cid(noise(8 * MIB, 9)), 8 * MIB)
    assert store.files() == before
    assert all(store.path(cid) is not None for cid in before)
    store.close()


def test_a_full_disk_is_a_sentence(store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "RESERVE_BYTES", shutil.disk_usage(tmp_path).free + (1 << 40))
    with pytest.raises(DiskError, match=r"the disk of .* has .* left"):
        store.add_file(source(tmp_path, noise(10)), pin="a")


def test_running_out_of_disk_while_writing_is_a_sentence(tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    store = BlobStore(tmp_path / "content", 100 * MIB)
    data = noise(3 * MIB)
    partial = begun(store, data, blocks=1)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, partial._descriptor)  # type: ignore[arg-type]
    os.close(full)
    cid = next(iter(partial.wanted()))
    with pytest.raises(DiskError, match="the disk is full"):
        partial.write([(cid, blocks_of(data)[cid])])
    partial.close()
    store.close()


def test_removing_unpinned_things_spares_fetches_and_pins(store: BlobStore, tmp_path: Path) -> None:
    keep = store.add_file(source(tmp_path, noise(MIB, 1)), pin="keep")
    store.add_file(source(tmp_path, noise(MIB, 2)), pin="drop")
    partial = begun(store, noise(3 * MIB, 3), blocks=2)
    store.unpin("drop")
    assert store.remove_unpinned() == MIB
    assert store.files() == {keep}
    partial.close()
    assert store.remove_unpinned() == 3 * MIB


def test_a_deleted_or_edited_file_is_forgotten(store: BlobStore, tmp_path: Path) -> None:
    for seed, harm in enumerate(("delete", "edit")):
        data = noise(2 * MIB, seed)
        cid = store.add_file(source(tmp_path, data), pin="a")
        path = store.path(cid)
        assert path is not None
        if harm == "delete":
            path.unlink()
        else:
            path.chmod(0o600)
            with path.open("r+b") as file:
                file.write(b"edited")
            os.utime(path, ns=(1, 1))
        assert store.read_blocks([tree_of(data).leaves[1]]) == [None]
        assert store.path(cid) is None
        fetched(store, data)


def test_leftovers_are_tidied_up_and_a_lost_index_is_rebuilt(store: BlobStore, tmp_path: Path) -> None:
    data = noise(2 * MIB + 1)
    cid = store.add_file(source(tmp_path, data), pin="a")
    folder = store.folder
    store.close()
    (folder / "tmp" / "left").write_bytes(b"x")
    (folder / "files" / "not-a-cid").write_bytes(b"x")
    (folder / "files" / file_cid(b"other")).write_bytes(b"wrong bytes")
    for name in folder.glob("index.sqlite*"):
        name.unlink()
    again = BlobStore(folder, 100 * MIB)
    assert again.files() == {cid}
    path = again.path(cid)
    assert path is not None and path.read_bytes() == data
    assert [p.name for p in (folder / "files").iterdir()] == [cid]
    assert list((folder / "tmp").iterdir()) == []
    again.close()
    BlobStore(folder, 100 * MIB).close()


@pytest.mark.parametrize("size", [0, 300, MIB + 5, 3 * MIB + 5])
@pytest.mark.parametrize("wrapped", [False, True], ids=["raw", "the default of Kubo"])
def test_files_that_other_tools_cut_smaller_are_resumed_served_and_read_in_anew(
    tmp_path: Path, size: int, wrapped: bool
) -> None:
    data, shape = noise(size), {"chunk": 1 << 18, "wrapped": wrapped, "old": wrapped}
    for blocks in (3, None):  # the second time it goes on where the first one stopped
        opened = BlobStore(tmp_path / "content", 100 * MIB)
        partial = fetch(opened, data, blocks=blocks, **shape)
        if isinstance(partial, PartialFile):
            assert partial.done_bytes == 2 << 18
            partial.close()
        if blocks:
            opened.close()
    for name, block in blocks_of(data, **shape).items():
        assert opened.block_size(name) == len(block)
        assert opened.read_blocks([name]) == [block]
    opened.close()
    for file in opened.folder.glob("index.sqlite*"):
        file.unlink()
    again = BlobStore(tmp_path / "content", 100 * MIB)
    root = tree_of(data, **shape).root
    assert again.files() == {root}
    path = again.path(root)
    assert path is not None and path.read_bytes() == data
    again.close()


def test_damaged_and_future_indexes_are_sentences(tmp_path: Path) -> None:
    folder = tmp_path / "content"
    store = BlobStore(folder, MIB)
    with store.index.transaction() as db:
        db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(DiskError, match="newer meshnode"):
        BlobStore(folder, MIB)
    for name in folder.glob("index.sqlite*"):
        name.unlink()
    (folder / "index.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(DiskError, match=r"index\.sqlite.*delete it"):
        BlobStore(folder, MIB)


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(b"")
    with pytest.raises(DiskError, match="can't use the content folder"):
        BlobStore(tmp_path / "content", MIB)


@pytest.mark.parametrize("name", ["../../etc/passwd", "bafy/../x", "", "b" * 59, "Qm" + "a" * 44])
def test_names_that_are_no_cids_never_become_paths(store: BlobStore, name: str) -> None:
    for call in (store.path, store.block, store.remove):
        with pytest.raises(RemoteProtocolError):
            call(Cid(name))
    with pytest.raises(RemoteProtocolError):
        store.open_partial(Cid(name), 5)


def test_an_interrupted_transaction_leaves_nothing_behind(store: BlobStore, tmp_path: Path) -> None:
    cid = store.add_file(source(tmp_path, noise(10)), pin="a")
    with pytest.raises(KeyError), store.index.transaction() as db:
        db.execute("DELETE FROM files")
        raise KeyError
    assert store.path(cid) is not None
    block = store.block(cid)
    assert block is not None and cid_matches(cid, block)


def test_a_file_that_somebody_wrote_into_is_told_when_it_is_dropped(store: BlobStore, tmp_path: Path) -> None:
    cid = store.add_file(source(tmp_path, noise(100)), pin="model")
    path = store.path(cid)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"four" + noise(100)[4:])
    with capture_logs() as logs:
        assert store.path(cid) is None
    (event,) = logs
    assert (event["event"], event["log_level"], event["cid"]) == ("file.dropped", "warning", cid)
    assert event["reason"] == "somebody wrote into it"
    assert not path.exists()


@pytest.mark.parametrize("silent", [True, False])
def test_damage_is_found_by_the_bytes_and_a_touched_file_stays(
    store: BlobStore, tmp_path: Path, silent: bool
) -> None:
    good, bad = (store.add_file(source(tmp_path, noise(MIB + 7, seed)), pin="model") for seed in (1, 2))
    kept, damaged = store.path(good), store.path(bad)
    assert kept is not None and damaged is not None
    before = damaged.stat()
    damaged.chmod(0o600)
    with damaged.open("r+b") as file:
        file.seek(1000)
        file.write(b"four")
    if silent:  # as a bit that flips on the disk
        os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(kept, ns=(0, 0))
    assert store.sound(good) is True
    assert store.path(good) == kept
    assert store.sound(bad) is False
    assert not damaged.exists()
    assert store.sound(bad) is None
    assert store.files() == {good}
    assert store.pins()["model"] == {good, bad}
    assert store.sound(file_cid(b"never here")) is None
