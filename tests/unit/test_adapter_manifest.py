"""The manifest of an adapter: vectors, limits, and which files a span needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.adapter.manifest import (
    MAX_LAYER_BYTES,
    MAX_MANIFEST_BYTES,
    AdapterManifest,
    decode_adapter,
    encode_adapter,
)
from protocols.dag_cbor import dumps, link_to_wire
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, RAW, cid_of
from protocols.manifest.messages import MAX_LAYERS, FileRef
from tests.vectors import Case, hold

BASE, SHAPE = cid_of(DAG_CBOR, b"a release"), cid_of(DAG_CBOR, b"a frame")


def file(layer: int) -> FileRef:
    return FileRef(cid=cid_of(RAW, f"layer {layer}".encode()), size=1000 + layer)


def manifest(first: int = 2, last: int = 5, **more: Any) -> AdapterManifest:
    layers = tuple(file(layer) for layer in range(first, last))
    return replace(AdapterManifest(base=BASE, frame=SHAPE, version=3, first=first, layers=layers), **more)


def wire(**more: Any) -> bytes:
    """A manifest of one layer with some values replaced; None leaves one out."""
    plain = {
        "schema": 1,
        "base": link_to_wire(BASE),
        "frame": link_to_wire(SHAPE),
        "version": 0,
        "first": 0,
        "layers": [{"cid": link_to_wire(file(0).cid), "size": 1}],
    } | more
    return dumps({key: value for key, value in plain.items() if value is not None})


def test_vectors() -> None:
    samples = {
        "three layers": manifest(),
        "one layer, the first": manifest(0, 1, version=0),
        "the last layer that there can be": manifest(MAX_LAYERS - 1, MAX_LAYERS),
    }
    one = {"cid": link_to_wire(file(0).cid), "size": 1}
    bad = {
        "empty": b"",
        "no map": dumps([1]),
        "another schema": wire(schema=2),
        "a schema that is true": wire(schema=True),
        "no frame": wire(frame=None),
        "an unknown key": wire(rank=4),
        "base is a file": wire(base=link_to_wire(file(0).cid)),
        "base is text": wire(base=BASE),
        "no layers": wire(layers=[]),
        "a layer behind the last one": wire(first=MAX_LAYERS - 1, layers=[one, one]),
        "first is a bool": wire(first=False),
        "version below 0": wire(version=-1),
        "an empty file": wire(layers=[{**one, "size": 0}]),
        "a file that is too large": wire(layers=[{**one, "size": MAX_LAYER_BYTES + 1}]),
        "a file that is a manifest": wire(layers=[{**one, "cid": link_to_wire(BASE)}]),
        "a trailing byte": wire() + b"\0",
    }
    cases = [Case(name, encode_adapter(sample), sample) for name, sample in samples.items()]
    hold("adapter", cases + [Case(name, data) for name, data in bad.items()], decode_adapter)


def test_a_span_needs_the_files_of_its_layers() -> None:
    adapter = manifest(2, 5)
    assert adapter.files(0, 3) == {2: file(2)}
    assert adapter.files(3, 9) == {3: file(3), 4: file(4)}
    assert adapter.files(2, 5) == {layer: file(layer) for layer in (2, 3, 4)}
    assert adapter.files(0, 2) == adapter.files(5, 9) == {}


def test_its_name_is_that_of_its_bytes() -> None:
    adapter = manifest()
    assert adapter.cid == cid_of(DAG_CBOR, encode_adapter(adapter)) != replace(adapter, version=4).cid


def test_the_largest_one_fits() -> None:
    assert len(encode_adapter(manifest(0, MAX_LAYERS))) < MAX_MANIFEST_BYTES
    with pytest.raises(RemoteProtocolError, match="the limit is 131072"):
        decode_adapter(bytes(MAX_MANIFEST_BYTES + 1))
    with pytest.raises(LocalProtocolError, match="version is -1"):
        encode_adapter(manifest(version=-1))


@given(st.integers(0, 20), st.integers(1, 20), st.binary(max_size=8), st.integers(0, 400))
def test_no_damage_goes_unnoticed(first: int, count: int, noise: bytes, at: int) -> None:
    """Whatever is read is written the same way again."""
    data = encode_adapter(manifest(first, first + count))
    injured = data[:at] + noise + data[at + len(noise) :]
    try:
        found = decode_adapter(injured)
    except RemoteProtocolError:
        return
    assert encode_adapter(found) == injured
