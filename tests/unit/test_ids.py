from __future__ import annotations

import pytest

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
    short,
)
from protocols.multiaddr import parse_address

# libp2p specs, peer-ids/peer-ids.md, test vectors: the Ed25519 public key and its peer id.
PUBLIC_KEY = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
PEER = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
HELLO = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"  # ipfs block of "hello world"


def test_a_peer_id_is_that_of_libp2p() -> None:
    assert peer_id_of(PUBLIC_KEY) == PEER
    assert public_key_of(PEER) == PUBLIC_KEY


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"32 bytes, not {size}"):
        peer_id_of(bytes(size))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA key, hashed
        "1" * 38,
        "1" + PEER,
        PEER[:-1],
        " " + PEER,
        "0OIl",
        "é" * 52,
        "z" * 129,
    ],
)
def test_what_is_no_peer_id_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        public_key_of(text)


def test_base58_keeps_leading_zeros() -> None:
    assert base58_encode(b"\0\0\x01") == "112"
    assert base58_decode("112") == b"\0\0\x01"
    assert base58_encode(b"") == ""
    assert base58_decode("") == b""
    assert base58_encode(b"Hello World!") == "2NEpo7TZRRrLZSi2U"


def test_a_cid_is_that_of_ipfs() -> None:
    assert cid_of(RAW, b"hello world") == HELLO
    assert cid_matches(HELLO, b"hello world")
    assert not cid_matches(HELLO, b"hello worle")
    assert cid_from_bytes(cid_to_bytes(HELLO)) == HELLO
    assert [cid_codec(cid_of(codec, b"")) for codec in (RAW, DAG_PB, DAG_CBOR)] == [RAW, DAG_PB, DAG_CBOR]


@pytest.mark.parametrize(
    "text",
    [
        "",
        HELLO[:-1],
        HELLO + "a",
        HELLO.upper(),
        "z" + HELLO[1:],
        HELLO[:-1] + "1",
        HELLO[:-1] + "f",  # other padding bits: the same bytes spelt otherwise
        HELLO[:-1] + "=",
        HELLO[:20] + "ı" + HELLO[21:],
        "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG",
        "bafyrgqhai26anf3i7pips7q22coa4sz2fr4gk4q4sqdtymvvjyginfzaqewveaeqdh524nsktaq43j65v22xxrybrtertmcfxufdam3da3hbk",
        "bagyqcvraypzcitp3hsbtyyxhfyc3p7i3226lullm2rkzqsqqlhnxus7tqnea",
    ],
)
def test_what_is_no_cid_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        cid_to_bytes(text)


def test_bytes_that_are_no_cid_are_refused() -> None:
    good = cid_to_bytes(HELLO)
    for wrong in (b"", good[:-1], good + b"\0", b"\0" + good[1:], good[:1] + b"\x70\x70" + good[3:]):
        with pytest.raises(RemoteProtocolError):
            cid_from_bytes(wrong)
    with pytest.raises(RemoteProtocolError):
        cid_from_bytes(good[:1] + b"\x51" + good[2:])  # plain CBOR is not a codec of ours


def test_a_cid_of_version_0_names_the_same_block() -> None:
    empty = bytes.fromhex("0a0408021800")  # what `ipfs add` makes of an empty file
    assert cid_of_old("QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH") == cid_of(DAG_PB, empty)
    assert cid_of_old(cid_of(RAW, b"x")) == cid_of(RAW, b"x")
    for text in (
        "Qm",
        "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQ",
        "Qm0FMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH",
        "",
    ):
        with pytest.raises(RemoteProtocolError):
            cid_of_old(text)


def test_ids_for_people() -> None:
    assert short(PEER) == "12D3…R3pq"
    assert short(HELLO) == "…" + HELLO[-8:]
    assert short("node-a") == "node-a"


@pytest.mark.parametrize("port", ["65536", "0" * 5000 + "1", "9" * 5000])
def test_a_port_that_is_none(port: str) -> None:
    """Python refuses to read 5,000 digits, with an error of its own."""
    with pytest.raises(RemoteProtocolError, match="65535 is the highest"):
        parse_address(f"/ip4/192.0.2.1/tcp/{port}")
