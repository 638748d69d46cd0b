"""Names: CIDs and peer ids of any length, alphabet, version, codec and hash."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.ids import (
    DAG_CBOR,
    DAG_PB,
    RAW,
    base58_decode,
    base58_encode,
    cid_codec,
    cid_from_bytes,
    cid_matches,
    cid_of,
    cid_of_old,
    cid_to_bytes,
    peer_id_of,
    public_key_of,
)
from tests.hostile import HUGE_NUMBERS, cost, mutated, varint


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


TEXTS: tuple[Callable[[str], object], ...] = (
    cid_to_bytes, cid_of_old, cid_codec, base58_decode, public_key_of, lambda text: cid_matches(text, b"x")
)  # fmt: skip
DIGEST = bytes(range(32))


def base32(data: bytes) -> str:
    return "b" + base64.b32encode(data).decode("ascii").lower().rstrip("=")


MULTIHASHES = {
    "identity": b"\x00\x05hello",
    "an identity of 64 KiB": b"\x00" + varint(1 << 16) + bytes(1 << 16),
    "sha2-256 cut to 20 bytes": b"\x12\x14" + DIGEST[:20],
    "sha2-256 with a byte too many": b"\x12\x21" + DIGEST + b"\0",
    "sha2-256 with a length in two bytes": b"\x12\xa0\x00" + DIGEST,
    "sha2-512": b"\x13\x40" + DIGEST * 2,
    "blake3": b"\x1e\x20" + DIGEST,
    "an unknown function": b"\xff\xff\x03\x20" + DIGEST,
    "no digest": b"\x12\x00",
    "no length": b"\x12",
    "nothing": b"",
    **{f"a length of {number}": b"\x12" + varint(number) + DIGEST for number in HUGE_NUMBERS},
}


@pytest.mark.parametrize("kind", MULTIHASHES)
def test_a_cid_with_another_hash_is_refused_in_every_spelling(kind: str) -> None:
    multihash = MULTIHASHES[kind]
    for version in (b"\x01\x55", b"\x01\x70", b"\x01\x71", b"\x01\xff\x7f", b"\x00\x70", b"\x02\x55", b""):
        binary = version + multihash
        assert cost(lambda binary=binary: cid_from_bytes(binary), RemoteProtocolError).refused  # type: ignore[misc]
        for text in (base32(binary), "Qm" + base58_encode(binary[:60])):
            spent = cost(lambda text=text: cid_of_old(text), RemoteProtocolError)  # type: ignore[misc]
            assert spent.refused and spent.calls < 200


def test_a_cid_of_version_0_stands_only_where_it_is_meant_to() -> None:
    old = base58_encode(b"\x12\x20" + DIGEST)
    assert old.startswith("Qm") and cid_of_old(old) == cid_from_bytes(bytes((1, DAG_PB, 0x12, 32)) + DIGEST)
    for call in (cid_to_bytes, cid_codec, lambda text: cid_matches(text, b"x"), public_key_of):
        assert cost(lambda call=call: call(old), RemoteProtocolError).refused  # type: ignore[misc]
    for binary in (b"\x12\x20" + DIGEST, b"\x01\x12\x20" + DIGEST, b"\x01\x70" + b"\x01\x70\x12\x20" + DIGEST):
        with pytest.raises(RemoteProtocolError):
            cid_from_bytes(binary)
    for text in (old + "1", old[:-1], "1" + old, old.lower(), "z" + old, old + "\n", old + "\0", "Qm" * 22):
        with pytest.raises(RemoteProtocolError):
            cid_of_old(text)


@pytest.mark.parametrize("text", ["b" * 59, "b" + "a" * 58, "", "b", "Qm", "z", "f01551220", "m", "\0" * 59])
@pytest.mark.parametrize("factor", [1, 100_000])
def test_texts_of_any_length_cost_little(text: str, factor: int) -> None:
    for call in TEXTS:
        spent = cost(lambda call=call: call(text * factor), RemoteProtocolError)  # type: ignore[misc]
        assert spent.calls < 500 and spent.peak < 9 * len(text) * factor + 100_000


@pytest.mark.parametrize(
    "odd", ["İ" * 58, "ſ" * 58, "ß" * 29, "１" * 58, "а" * 58, "\ud800" * 58, "=" * 58, "+" * 58]
)
def test_characters_that_change_when_they_are_folded(odd: str) -> None:
    for call in TEXTS:
        assert cost(lambda call=call: call("b" + odd), RemoteProtocolError).refused  # type: ignore[misc]
        assert cost(lambda call=call: call("Qm" + odd), RemoteProtocolError).refused  # type: ignore[misc]


def respelt(at: int, letter: str) -> str:
    """A name with one other letter. In the last one (58), some bits say nothing."""
    cid = cid_of(RAW, b"x")
    return cid[:at] + letter + cid[at + 1 :]


LETTERS = st.characters(codec="ascii") | st.sampled_from("234567abcı")
NAMES = mutated(st.binary(max_size=40).map(lambda data: cid_of(RAW, data).encode())).map(
    lambda b: b.decode("latin-1")
)


@given(NAMES | st.builds(respelt, st.just(58) | st.integers(0, 58), LETTERS))
@settings(max_examples=250)
def test_injured_names_are_refused_or_canonical(text: str) -> None:
    for call in (cid_to_bytes, cid_of_old):
        try:
            found = call(text)
        except RemoteProtocolError as error:
            assert str(error).isprintable() and len(str(error)) < 500
            continue
        cid = cid_from_bytes(found) if isinstance(found, bytes) else found
        assert text in (cid, base58_encode(cid_to_bytes(cid)[2:]))  # the second is its CIDv0


@given(mutated(st.binary(min_size=32, max_size=32).map(lambda key: peer_id_of(key).encode())))
@settings(max_examples=150)
def test_injured_peer_ids_are_refused_or_canonical(data: bytes) -> None:
    text = data.decode("latin-1")
    with contextlib.suppress(RemoteProtocolError):
        assert peer_id_of(public_key_of(text)) == text


@given(mutated(st.binary(min_size=32, max_size=32).map(lambda digest: bytes((1, RAW, 0x12, 32)) + digest)))
@settings(max_examples=150)
def test_injured_binary_names(data: bytes) -> None:
    spent = cost(lambda: cid_from_bytes(data), RemoteProtocolError)
    assert spent.refused or cid_to_bytes(spent.result) == data
