from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.ids import (
    DAG_CBOR,
    DAG_PB,
    RAW,
    base58_decode,
    base58_encode,
    cid_from_bytes,
    cid_of,
    cid_to_bytes,
    peer_id_of,
    public_key_of,
)


@given(st.binary(max_size=60))
def test_base58_comes_back(data: bytes) -> None:
    assert base58_decode(base58_encode(data)) == data


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_holds_its_key(key: bytes) -> None:
    peer = peer_id_of(key)
    assert peer.startswith("12D3KooW")
    assert public_key_of(peer) == key


@given(st.sampled_from([RAW, DAG_PB, DAG_CBOR]), st.binary(max_size=60))
def test_a_cid_comes_back(codec: int, block: bytes) -> None:
    cid = cid_of(codec, block)
    assert cid_from_bytes(cid_to_bytes(cid)) == cid


@settings(max_examples=200)
@given(st.text(max_size=60), st.data())
def test_one_wrong_character_is_refused_or_another_name(other: str, data: st.DataObject) -> None:
    cid = str(cid_of(RAW, b"x"))
    at = data.draw(st.integers(0, len(cid) - 1))
    for text in (other, cid[:at] + other + cid[at + 1 :]):
        with contextlib.suppress(RemoteProtocolError):
            assert cid_from_bytes(cid_to_bytes(text)) == text
        with contextlib.suppress(RemoteProtocolError):
            assert peer_id_of(public_key_of(text)) == text


@given(st.binary(max_size=40))
def test_random_bytes_are_refused_or_a_cid(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert cid_to_bytes(cid_from_bytes(data)) == data
