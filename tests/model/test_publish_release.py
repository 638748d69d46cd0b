"""From the publisher's folder to a signed manifest in the store. Needs no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey

from meshnode.core.errors import DiskError, ModelError
from meshnode.publisher.release import release
from meshnode.store.blob_store import BlobStore
from protocols.ids import DAG_CBOR, cid_codec, peer_id_of
from protocols.manifest.codec import open_manifest

KEY = SigningKey(b"r" * 32)
PUBLISHER = peer_id_of(bytes(KEY.verify_key))
NOW_MS = 1_700_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    opened = BlobStore(tmp_path / "store", 1 << 30)
    yield opened
    opened.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the publisher leaves for a model of two layers with tied ends."""
    out = tmp_path / "out"
    (out / "int4").mkdir(parents=True)

    def put(path: str) -> dict[str, Any]:
        content = f"content of {path}".encode()
        (out / path).write_bytes(content)
        return {"path": path, "size": len(content)}

    ends = put("int4/embed.safetensors")
    quality = {"text": "t", "tokens": 700, "perplexity_milli": 21_000, "reference_milli": 19_000}
    architecture = {
        "family": "llama",
        "layers": 2,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocab": 256,
        "context": 128,
        "bos_ids": [1],
        "eos_ids": [2],
    }
    variant = {
        "kernel_class": "ort-cpu-int4-b32-a4/1",
        "graph": put("graph-int4.onnx"),
        "embed": ends,
        "layers": [put("int4/layer.0.safetensors"), put("int4/layer.1.safetensors")],
        "head": ends,
        "quality": quality,
    }
    files = {name: put(name) for name in ("config.json", "tokenizer.json")}
    index = {"name": "tiny", "architecture": architecture, "files": files, "variants": {"int4": variant}}
    (out / "index.json").write_text(json.dumps(index))
    return out


def take(folder: Path, store: BlobStore, **more: Any) -> Any:
    return release(folder, store, KEY, created_ms=NOW_MS, publisher=PUBLISHER, **more)


def test_a_release_is_signed_stored_and_pinned(folder: Path, store: BlobStore) -> None:
    cid, manifest = take(folder, store)
    block = store.block(cid)
    assert block is not None
    assert cid_codec(cid) == DAG_CBOR
    assert open_manifest(block) == manifest
    assert (manifest.name, manifest.version, manifest.publisher) == ("tiny", "v1.0.0-0", PUBLISHER)
    variant = manifest.variants["int4"]
    assert variant.embed == variant.head
    kept = store.path(variant.layers[1].cid)
    assert kept is not None
    assert kept.read_bytes() == b"content of int4/layer.1.safetensors"
    assert store.pins() == {cid: frozenset({cid, *manifest.all_files()})}


def test_the_same_folder_gives_the_same_name(folder: Path, store: BlobStore, tmp_path: Path) -> None:
    again = BlobStore(tmp_path / "other", 1 << 30)
    assert take(folder, store)[0] == take(folder, again)[0]
    again.close()


def test_name_and_version_can_be_given(folder: Path, store: BlobStore) -> None:
    _, manifest = take(folder, store, name="my-model", version="v2.1.0-3")
    assert (manifest.name, manifest.version) == ("my-model", "v2.1.0-3")


@pytest.mark.parametrize(
    ("more", "words"), [({"name": "My Model"}, "name is 'My Model'"), ({"version": "2"}, "version")]
)
def test_a_bad_name_leaves_nothing_pinned(folder: Path, store: BlobStore, more: dict[str, str], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        take(folder, store, **more)
    assert store.pins() == {}


def test_a_missing_or_short_file_is_named(folder: Path, store: BlobStore) -> None:
    (folder / "int4" / "layer.1.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"layer\.1\.safetensors is missing or not complete"):
        take(folder, store)
    assert store.pins() == {}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "tiny", "architecture": {"layers": 1}}'])
def test_a_damaged_index(folder: Path, store: BlobStore, content: str) -> None:
    (folder / "index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json.*model add"):
        take(folder, store)


def test_a_folder_without_index(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"index\.json can't be read"):
        take(tmp_path, store)


def test_a_store_that_is_full(folder: Path, tmp_path: Path) -> None:
    small = BlobStore(tmp_path / "small", 100)
    with pytest.raises(DiskError):
        take(folder, small)
    small.close()


def test_releasing_needs_no_torch() -> None:
    heavy = "('torch', 'transformers', 'onnx', 'onnxruntime')"
    code = f"import sys, meshnode.publisher.release; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_read_only_files_are_linked_and_not_copied(folder: Path, store: BlobStore) -> None:
    path = folder / "int4" / "layer.0.safetensors"
    path.chmod(0o444)
    _, manifest = take(folder, store)
    kept = store.path(manifest.variants["int4"].layers[0].cid)
    assert kept is not None
    assert kept.stat().st_ino == path.stat().st_ino
    shutil.rmtree(folder)
    assert kept.exists()
