"""A release into a CAR file and out of it: equal bytes and CIDs, in any order of the blocks, never half."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from nacl.signing import SigningKey

import meshnode.store.eviction
from meshnode.core.errors import ConfigError, Declined, DiskError, ModelError
from meshnode.ipfs import car_export, car_import
from meshnode.ipfs.car_export import export_car, files_of
from meshnode.ipfs.car_import import Imported, import_car
from meshnode.publisher.release import release
from meshnode.store.blob_store import BlobStore
from protocols.car.machine import Reader
from protocols.car.messages import Block, Header, encode_block, encode_header
from protocols.ids import DAG_CBOR, DAG_PB, RAW, Cid, cid_from_bytes, cid_of, cid_to_bytes, peer_id_of
from protocols.manifest.codec import sign_manifest
from protocols.manifest.messages import FileRef, Manifest
from protocols.protobuf import put_field
from tests.process.mesh_rig import small_model

KEY = SigningKey(bytes(range(32)))
PUBLISHER = peer_id_of(bytes(KEY.verify_key))
NOW_MS = 1_700_000_000_000
QUOTA_BYTES = 1 << 30
LAYERS = 3
LAYER_BYTES = (2 << 20) + 12_345  # three leaves and an inner node


@dataclass
class Origin:
    store: BlobStore
    cid: Cid
    manifest: Manifest
    car: Path

    def items(self) -> list[Block]:
        """The blocks of the CAR, as they stand in it."""
        return blocks_of(self.car, self.cid)


def blocks_of(car: Path, root: Cid) -> list[Block]:
    reader = Reader()
    reader.feed(car.read_bytes())
    assert reader.next() == Header((cid_to_bytes(root),))
    found = []
    while (item := reader.next()) is not None:
        assert isinstance(item, Block)
        found.append(item)
    reader.finish()
    return found


def write(path: Path, root: Cid, items: list[Block]) -> Path:
    path.write_bytes(encode_header(Header((cid_to_bytes(root),))) + b"".join(encode_block(item) for item in items))
    return path


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """A release of two variants. In fp32, layer 1 ends with other bytes, and layer 2 is a file of equal chunks."""
    folder = tmp_path_factory.mktemp("origin")
    published = small_model(folder / "model", layers=LAYERS, layer_bytes=LAYER_BYTES)
    index = json.loads((published / "index.json").read_text())
    other = dict(index["variants"]["int4"])
    data = (published / "layer.1").read_bytes()
    for name, content in (("fp32.layer.1", data[:-5] + b"other"), ("fp32.layer.2", data[: 1 << 20] * 3)):
        (published / name).write_bytes(content)
    entries = [{"path": name, "size": (published / name).stat().st_size} for name in ("fp32.layer.1", "fp32.layer.2")]
    other["layers"] = [other["layers"][0], *entries]
    index["variants"]["fp32"] = other
    (published / "index.json").write_text(json.dumps(index))
    store = BlobStore(folder / "content", QUOTA_BYTES)
    cid, manifest = release(published, store, KEY, created_ms=NOW_MS, publisher=PUBLISHER)
    car = folder / "model.car"
    size = export_car(store, cid, files_of(manifest, manifest.variants), car)
    assert car.stat().st_size == size
    yield Origin(store, cid, manifest, car)
    store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore(tmp_path / "content", QUOTA_BYTES)
    yield store
    store.close()


def check_whole(store: BlobStore, origin: Origin, found: Imported) -> None:
    assert (found.cid, found.manifest) == (origin.cid, origin.manifest)
    assert found.variants == ("int4", "fp32")
    for cid in origin.manifest.all_files():
        ours, theirs = store.path(cid), origin.store.path(cid)
        assert ours is not None and theirs is not None
        assert ours.read_bytes() == theirs.read_bytes()
    assert store.block(origin.cid) == origin.store.block(origin.cid)
    assert store.pins() == {origin.cid: frozenset({origin.cid, *origin.manifest.all_files()})}


def check_nothing(store: BlobStore, origin: Origin) -> None:
    assert store.block(origin.cid) is None
    assert store.pins() == {}


# ---------------------------------------------------------------- export


def test_the_car_is_depth_first_and_holds_each_block_once(origin: Origin) -> None:
    items = origin.items()
    names = [item.cid for item in items]
    assert cid_from_bytes(names[0]) == origin.cid
    assert len(set(names)) == len(names)
    variant = origin.manifest.variants["int4"]
    first = names.index(cid_to_bytes(variant.layers[0].cid))
    assert names[first][1] == DAG_PB
    data = b"".join(item.data for item in items[first + 1 : first + 4])
    path = origin.store.path(variant.layers[0].cid)
    assert path is not None and path.read_bytes() == data
    before = [names.index(cid_to_bytes(ref.cid)) for ref in files_of(origin.manifest, ("fp32", "int4"))]
    assert before == sorted(before)


def test_one_variant_alone(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    files = files_of(origin.manifest, ("fp32",))
    export_car(origin.store, origin.cid, files, tmp_path / "one.car")
    passes: list[int] = []
    found = import_car(store, tmp_path / "one.car", progress=lambda done, total: passes.append(done // total))
    assert found.variants == ("fp32",)
    assert sum(passes) == 1  # files that are not in it cost no second pass
    assert store.pins() == {origin.cid: frozenset({origin.cid, *(ref.cid for ref in files)})}
    both = import_car(store, origin.car)  # the rest comes later
    check_whole(store, origin, both)


def test_blocks_keep_the_names_that_their_parents_give_them(store: BlobStore, tmp_path: Path) -> None:
    """A tree as Kubo makes it by default: leaves are dag-pb nodes, and links are CIDv0."""
    leaves = [put_field(1, put_field(1, 2) + put_field(2, text) + put_field(3, 5)) for text in (b"first", b"other")]
    names = [cid_to_bytes(store.put_block(leaf, DAG_PB)) for leaf in leaves]
    links = [put_field(2, put_field(1, name[2:]) + put_field(2, b"") + put_field(3, 13)) for name in names]
    sizes = put_field(1, 2) + put_field(3, 10) + put_field(4, 5) + put_field(4, 5)
    root = store.put_block(b"".join(links) + put_field(1, sizes), DAG_PB)
    manifest = store.put_block(b"\xa0", DAG_CBOR)
    car = tmp_path / "x.car"
    export_car(store, manifest, [FileRef(cid=root, size=10)], car)
    items = blocks_of(car, manifest)
    assert [(item.cid, item.old) for item in items[1:]] == [
        (cid_to_bytes(root), False),
        (names[0], True),
        (names[1], True),
    ]


def test_an_existing_file_is_not_replaced(origin: Origin, tmp_path: Path) -> None:
    target = tmp_path / "there.car"
    target.write_text("mine")
    files = files_of(origin.manifest, ("int4",))
    with pytest.raises(ConfigError, match="--force"):
        export_car(origin.store, origin.cid, files, target)
    assert target.read_text() == "mine"
    export_car(origin.store, origin.cid, files, target, replace=True)
    assert target.stat().st_size > LAYERS * LAYER_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["there.car"]


@pytest.mark.parametrize(("target", "words"), [("", "is a folder"), ("nowhere/x.car", "is no folder")])
def test_a_target_that_is_no_file(origin: Origin, tmp_path: Path, target: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        export_car(origin.store, origin.cid, [], tmp_path / target)


def test_no_room_at_the_target(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of(origin.manifest, ("int4",))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(car_export.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskError, match="no room"):
        export_car(origin.store, origin.cid, files, tmp_path / "x.car")
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(car_export, "write_all", full)
    with pytest.raises(DiskError, match="the disk is full"):
        export_car(origin.store, origin.cid, files, tmp_path / "x.car")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_missing_file_is_not_exported(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    import_car(store, origin.car)
    layer = origin.manifest.variants["int4"].layers[1]
    path = store.path(layer.cid)
    assert path is not None
    status = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(LAYER_BYTES - 100)  # in its last leaf, which no other file has
        file.write(b"damage")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a failing disk does it
    target = tmp_path / "x.car"
    with pytest.raises(ModelError, match="damaged on this disk"):
        export_car(store, origin.cid, [layer], target)
    store.remove(layer.cid)
    with pytest.raises(ModelError, match="no longer on this node"):
        export_car(store, origin.cid, [layer], target)
    assert not [name for name in tmp_path.iterdir() if "car" in name.name]


# ---------------------------------------------------------------- import


def test_out_and_in_again(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    passes: list[int] = []
    found = import_car(store, origin.car, progress=lambda done, total: passes.append(done // total))
    check_whole(store, origin, found)
    assert sum(passes) == 1
    export_car(store, origin.cid, files_of(found.manifest, found.variants), tmp_path / "again.car")
    assert (tmp_path / "again.car").read_bytes() == origin.car.read_bytes()
    assert import_car(store, origin.car) == found  # nothing is left to do


@pytest.mark.parametrize("open_files", [128, 2])
def test_blocks_in_any_order(
    origin: Origin,
    store: BlobStore,
    tmp_path: Path,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
    open_files: int,
) -> None:
    monkeypatch.setattr(car_import, "MAX_OPEN", open_files)
    items = origin.items()
    rng.shuffle(items)
    check_whole(store, origin, import_car(store, write(tmp_path / "x.car", origin.cid, items)))


def test_leaves_before_everything_and_foreign_blocks_between(
    origin: Origin, store: BlobStore, tmp_path: Path
) -> None:
    foreign = b"a block of something else"
    items = [Block(cid_to_bytes(cid_of(RAW, foreign)), foreign), *reversed(origin.items())]
    check_whole(store, origin, import_car(store, write(tmp_path / "x.car", origin.cid, [*items, items[3]])))


def test_every_kind_of_damage_and_then_the_right_file(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    whole = bytearray(origin.car.read_bytes())
    path = tmp_path / "x.car"
    for data, words in (
        (whole[:-1], "ends within a block"),
        (whole[: len(whole) // 2], "ends within a block"),
        (whole[:30], "ends within its header"),
        (b"", "ends within its header"),
        (bytes.fromhex("0aa16776657273696f6e02") + whole, "version 2"),
        (random.Random(1).randbytes(100_000), "can't be imported"),
        (whole + b"\0", "has no bytes"),
    ):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=words):
            import_car(store, path)
        check_nothing(store, origin)
    for place in (len(whole) // 3, len(whole) - 2):
        spoilt = bytearray(whole)
        spoilt[place] ^= 4
        path.write_bytes(spoilt)
        with pytest.raises(ModelError, match="is damaged"):
            import_car(store, path)
        check_nothing(store, origin)
    check_whole(store, origin, import_car(store, origin.car))


def test_a_stopped_import_goes_on(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    """What was verified is not written twice: the second file lacks what the first one brought."""
    items = origin.items()
    half = len(items) // 2
    with pytest.raises(ModelError, match="holds no variant"):
        import_car(store, write(tmp_path / "x.car", origin.cid, items[:half]))
    check_nothing(store, origin)
    roots = {cid_to_bytes(cid) for cid in origin.manifest.all_files()}
    rest = [item for at, item in enumerate(items) if at == 0 or at >= half or item.cid in roots]
    assert len(rest) < len(items)
    check_whole(store, origin, import_car(store, write(tmp_path / "x.car", origin.cid, rest)))


def test_what_a_killed_import_left_is_tidied_up(origin: Origin, store: BlobStore) -> None:
    layer = origin.manifest.variants["int4"].layers[0]
    partial = store.open_partial(layer.cid, layer.size)
    assert not isinstance(partial, Path)
    wanted = next(item for item in origin.items() if item.cid == cid_to_bytes(layer.cid))
    partial.write([(wanted.cid, wanted.data)])
    partial.close()
    store.pin(layer.cid, f"import {origin.cid}")
    check_whole(store, origin, import_car(store, origin.car))


def test_a_release_that_lies_about_a_size(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    variant = origin.manifest.variants["fp32"]
    for ref in (variant.layers[1], variant.graph):
        lie = dataclasses.replace(ref, size=ref.size + 1)
        changed = dataclasses.replace(
            variant,
            graph=lie if ref is variant.graph else variant.graph,
            layers=tuple(lie if layer is ref else layer for layer in variant.layers),
        )
        block = sign_manifest(KEY, dataclasses.replace(origin.manifest, variants={"fp32": changed}))
        cid = cid_of(DAG_CBOR, block)
        items = [Block(cid_to_bytes(cid), block), *origin.items()[1:]]
        for _ in range(2):
            with pytest.raises(ModelError, match="gave a wrong size"):
                import_car(store, write(tmp_path / "x.car", cid, items))
        assert store.block(cid) is None and store.pins() == {}


def test_without_one_block_the_other_variant_is_taken(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    last = cid_to_bytes(origin.manifest.variants["fp32"].layers[2].cid)
    items = [item for item in origin.items() if item.cid != last]
    assert import_car(store, write(tmp_path / "x.car", origin.cid, items)).variants == ("int4",)


def test_without_a_common_file(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    common = cid_to_bytes(origin.manifest.files["tokenizer.json"].cid)
    items = [item for item in origin.items() if item.cid != common]
    with pytest.raises(ModelError, match="1 of 7 files"):
        import_car(store, write(tmp_path / "x.car", origin.cid, items))
    check_nothing(store, origin)


def test_foreign_archives(origin: Origin, store: BlobStore, tmp_path: Path) -> None:
    items = origin.items()
    path = tmp_path / "x.car"
    with pytest.raises(ModelError, match="is no exported model"):
        import_car(store, write(path, cid_from_bytes(items[1].cid), items))
    with pytest.raises(ModelError, match="lacks the manifest"):
        import_car(store, write(path, origin.cid, items[1:]))
    forged = items[0].data.replace(b"small-noise", b"large-noise")
    assert forged != items[0].data
    cid = cid_of(items[0].cid[1], forged)
    with pytest.raises(ModelError, match="signature"):
        import_car(store, write(path, cid, [Block(cid_to_bytes(cid), forged), *items[1:]]))
    with pytest.raises(ConfigError, match="can't be read"):
        import_car(store, tmp_path / "nowhere.car")
    with pytest.raises(ModelError, match=r"is a folder.*meshnode model add"):
        import_car(store, tmp_path)
    for root in (b"\xa1\x65hello\x65world", b"\x80"):
        foreign = cid_of(DAG_CBOR, root)
        with pytest.raises(ModelError, match=r"is no exported model: its root is no meshnode manifest"):
            import_car(store, write(path, foreign, [Block(cid_to_bytes(foreign), root)]))
    for data in (
        random.Random(1).randbytes(1000),
        b"PK\x03\x04 an archive of another kind" * 20,
        b"hello, world" * 20,
    ):
        path.write_bytes(data)
        with pytest.raises(ModelError, match="can't be imported: this is no CAR file: "):
            import_car(store, path)
    assert store.files() == frozenset() and store.pins() == {}


def test_no_room(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path / "content", 2 * LAYER_BYTES)
    with pytest.raises(DiskError, match=r"content\.quota"):
        import_car(store, origin.car)
    check_nothing(store, origin)
    store.room.quota_bytes = QUOTA_BYTES
    monkeypatch.setattr(meshnode.store.eviction, "RESERVE_BYTES", 1 << 62)
    with pytest.raises(DiskError, match="free some space"):
        import_car(store, origin.car)
    check_nothing(store, origin)
    monkeypatch.undo()
    check_whole(store, origin, import_car(store, origin.car))
    store.close()


def test_a_file_that_is_being_fetched(origin: Origin, store: BlobStore) -> None:
    """Another process holds a file of it: an answer that says so, and later the import goes through."""
    layer = origin.manifest.variants["int4"].layers[0]  # of both variants
    partial = store.open_partial(layer.cid, layer.size)
    assert not isinstance(partial, Path)
    with pytest.raises(Declined, match="another process"):
        import_car(store, origin.car)
    check_nothing(store, origin)
    partial.close()
    check_whole(store, origin, import_car(store, origin.car))
