"""The content folder with encrypted files: the same CIDs and blocks, and nothing of a file's bytes on the disk."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from meshnode.core.errors import ConfigError, DiskError, ModelError
from meshnode.store.blob_store import BlobStore
from meshnode.store.cipher import Cipher
from meshnode.store.encryption import SUFFIX, is_sealed, set_sealed
from meshnode.store.partial import PartialFile
from protocols.ids import DAG_CBOR, Cid, cid_from_bytes, cid_matches
from protocols.unixfs.builder import Builder, Tree, file_cid

QUOTA = 1 << 40
KEY = Cipher(b"a" * 32, "network")
SIZE = (2 << 20) + 12_345


@pytest.fixture
def data() -> bytes:
    return random.Random(5).randbytes(SIZE)


@pytest.fixture
def source(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "source"
    path.write_bytes(data)
    path.chmod(0o444)  # a plain store links such a file
    return path


def sealed_store(folder: Path, cipher: Cipher = KEY) -> BlobStore:
    set_sealed(folder, cipher, True)
    return BlobStore(folder, QUOTA, cipher=cipher)


def read(store: BlobStore, cid: Cid) -> bytes:
    revealed = store.reveal(cid)
    assert revealed is not None
    with revealed as path:
        return path.read_bytes()


def on_disk(folder: Path, piece: bytes) -> bool:
    return any(piece in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("offset", [0, 1, 15, 16, 17, 1000, (1 << 36) + 5])
def test_a_piece_is_covered_wherever_it_begins(offset: int) -> None:
    name, text = b"\1\x55\x12\x20" + bytes(32), bytes(range(100))
    covered = KEY.apply(name, text, offset)
    assert len(covered) == len(text) and covered != text
    assert KEY.apply(name, covered, offset) == text
    assert KEY.apply(name, covered[7:], offset + 7) == text[7:], "a range of it alone, too"
    assert KEY.apply(name[:-1] + b"\1", text, offset) != covered, "each file has its own key"


def test_a_file_is_covered_on_the_disk_and_itself_elsewhere(tmp_path: Path, source: Path, data: bytes) -> None:
    folder = tmp_path / "content"
    store = sealed_store(folder)
    cid = store.add_file(source, pin="test")
    assert cid == file_cid(data)
    assert not on_disk(folder, data[5000:5032])
    assert [path.name for path in (folder / "files").iterdir()] == [cid + SUFFIX]
    assert read(store, cid) == data
    root = store.block(cid)
    assert root is not None and cid_matches(cid, root)
    store.close()
    again = sealed_store(folder)
    assert read(again, cid) == data
    again.close()


def test_a_revealed_copy_is_gone_when_it_is_closed(tmp_path: Path, source: Path) -> None:
    store = sealed_store(tmp_path / "content")
    revealed = store.reveal(store.add_file(source, pin="test"))
    assert revealed is not None
    with revealed as path:
        reader = path.open("rb")
    assert not path.exists()
    assert len(reader.read()) == SIZE, "whoever has it open keeps it"
    reader.close()
    store.close()


def test_a_fetch_is_covered_from_its_first_block_and_goes_on_after_a_stop(
    tmp_path: Path, source: Path, data: bytes
) -> None:
    giver, folder = BlobStore(tmp_path / "giver", QUOTA), tmp_path / "content"
    cid = giver.add_file(source, pin="test")
    done = 0
    for _ in range(2):  # the root and a leaf, then the rest
        store = sealed_store(folder)
        partial = store.open_partial(cid, SIZE)
        assert isinstance(partial, PartialFile)
        assert partial.done_bytes == done
        while not partial.complete and not (done == 0 and partial.done_bytes):
            name = next(iter(partial.wanted()))
            block = giver.block(cid_from_bytes(name))
            assert block is not None
            partial.write([(name, block)])
        assert not on_disk(folder, data[5000:5032])
        if partial.complete:
            partial.finish()
            assert read(store, cid) == data
        done = partial.done_bytes
        partial.close()
        store.close()
    giver.close()


def test_a_folder_is_converted_there_and_back(tmp_path: Path, source: Path, data: bytes) -> None:
    folder = tmp_path / "content"
    plain = BlobStore(folder, QUOTA)
    cid = plain.add_file(source, pin="test")
    manifest = plain.put_block(b"a manifest", DAG_CBOR)
    plain.close()
    store = sealed_store(folder)
    assert is_sealed(folder)
    assert store.files() == {cid, manifest}, "nothing was forgotten"
    assert store.pins() == {"test": {cid}}
    assert not on_disk(folder, data[5000:5032])
    assert read(store, cid) == data
    store.close()
    set_sealed(folder, KEY, False)
    assert not is_sealed(folder)
    plain = BlobStore(folder, QUOTA)
    path = plain.path(cid)
    assert path is not None and path.read_bytes() == data
    assert plain.files() == {cid, manifest}
    plain.close()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_conversion_that_was_cut_off_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    folder = tmp_path / "content"
    set_sealed(folder, KEY, not wanted)
    store = BlobStore(folder, QUOTA, cipher=KEY)
    contents = {}
    for number in range(4):
        path = tmp_path / str(number)
        path.write_bytes(random.Random(number).randbytes(100_000))
        contents[store.add_file(path, pin="test")] = path.read_bytes()
    store.close()
    left = [0, 1, 2]
    apply = Cipher.apply

    def cut_off(self: Cipher, name: bytes, data: bytes, offset: int) -> bytes:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return apply(self, name, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(Cipher, "apply", cut_off)
        with pytest.raises(KeyboardInterrupt):
            set_sealed(folder, KEY, wanted)
    between = BlobStore(folder, QUOTA, cipher=KEY)  # a command, before the node is started again
    between.close()
    set_sealed(folder, KEY, wanted)
    store = BlobStore(folder, QUOTA, cipher=KEY)
    assert is_sealed(folder) == wanted
    assert {cid: read(store, cid) for cid in contents} == contents
    store.close()


def test_a_lost_index_is_made_anew_from_covered_files(tmp_path: Path, source: Path, data: bytes) -> None:
    folder = tmp_path / "content"
    store = sealed_store(folder)
    cid = store.add_file(source, pin="test")
    store.close()
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    store = sealed_store(folder)
    assert store.files() == {cid}
    assert read(store, cid) == data
    store.close()


@pytest.mark.parametrize("cipher", [None, Cipher(b"b" * 32, "network"), Cipher(b"a" * 32, "other")])
def test_without_the_right_key_nothing_is_touched(tmp_path: Path, source: Path, cipher: Cipher | None) -> None:
    folder = tmp_path / "content"
    store = sealed_store(folder)
    cid = store.add_file(source, pin="test")
    store.close()
    with pytest.raises(ConfigError, match="encrypted"):
        BlobStore(folder, QUOTA, cipher=cipher)
    if cipher is not None:
        for wanted in (True, False):
            with pytest.raises(ConfigError, match="another node or network"):
                set_sealed(folder, cipher, wanted)
    store = sealed_store(folder)
    assert store.path(cid) is not None
    store.close()


def test_a_source_that_changes_between_its_two_readings_is_refused(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two plaintexts under one key would show each other, and one of them has not this CID."""
    path = tmp_path / "written to"
    path.write_bytes(data)
    before = path.stat()
    seek = os.lseek

    def change(descriptor: int, position: int, how: int) -> int:
        with path.open("r+b") as writer:
            writer.seek(70_000)
            writer.write(bytes(100))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as through a memory map
        return seek(descriptor, position, how)

    monkeypatch.setattr(os, "lseek", change)
    store = sealed_store(tmp_path / "content")
    with pytest.raises(ModelError, match="changed while it was read"):
        store.add_file(path, pin="test")
    assert store.files() == frozenset()
    store.close()


def test_an_addition_under_way_at_the_switch_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "content"
    source.chmod(0o644)  # copied
    plain = BlobStore(folder, QUOTA)
    finish = Builder.finish

    def switch(builder: Builder) -> Tree:
        set_sealed(folder, KEY, True)
        return finish(builder)

    monkeypatch.setattr(Builder, "finish", switch)
    with pytest.raises(DiskError, match="start this command again"):
        plain.add_file(source, pin="test")
    assert list((folder / "files").iterdir()) == list((folder / "tmp").iterdir()) == []
    plain.close()


def test_a_command_that_began_before_the_switch_writes_nothing_readable_after_it(
    tmp_path: Path, source: Path, data: bytes
) -> None:
    folder = tmp_path / "content"
    plain = BlobStore(folder, QUOTA)  # a command, which goes on while a node starts
    store = sealed_store(folder)
    with pytest.raises(DiskError, match="start this command again"):
        plain.add_file(source, pin="test")
    with pytest.raises(DiskError, match="start this command again"):
        plain.open_partial(file_cid(data), SIZE)
    assert not on_disk(folder, data[5000:5032])
    assert not any(path.stat().st_size for path in (folder / "files").iterdir())
    plain.close()
    store.close()


def test_damage_of_a_covered_file_is_found(tmp_path: Path, source: Path) -> None:
    store = sealed_store(tmp_path / "content")
    cid = store.add_file(source, pin="test")
    assert store.sound(cid) is True
    (path,) = (tmp_path / "content" / "files").iterdir()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"four")
    assert store.sound(cid) is False
    assert not path.exists()
    store.close()
