"""Names of things on the wire: peer ids, CIDs, session ids; how they are parsed and shown.

A peer id is the libp2p peer id of an Ed25519 key: base58btc of the identity multihash of the protobuf
public key (libp2p specs, peer-ids.md). A CID is version 1, sha2-256, base32 (multiformats specs).
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from typing import Final, NewType

from protocols.errors import RemoteProtocolError

PeerId = NewType("PeerId", str)
Cid = NewType("Cid", str)
SessionId = NewType("SessionId", bytes)

SESSION_BYTES: Final = 16
RAW: Final = 0x55  # multicodec: raw binary
DAG_PB: Final = 0x70  # multicodec: MerkleDAG protobuf (UnixFS inner nodes)
DAG_CBOR: Final = 0x71  # multicodec: MerkleDAG CBOR (manifests, records)

KEPT_IDS: Final = 4096  # ids of peers that are not worked out again: the same few come in every record
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_INDEX = {c: i for i, c in enumerate(_BASE58)}
_ED25519_PREFIX = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))  # identity multihash, 36 bytes, KeyType Ed25519


def base58_encode(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = []
    while number:
        number, rest = divmod(number, 58)
        digits.append(_BASE58[rest])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(digits))


def base58_decode(text: str) -> bytes:
    """Raises RemoteProtocolError for a character outside the alphabet or an absurd length."""
    if len(text) > 128:
        raise RemoteProtocolError(f"a base58 text of {len(text)} characters; 128 is the limit")
    number = 0
    for c in text:
        if c not in _BASE58_INDEX:
            raise RemoteProtocolError(f"{c!r} is no base58 character")
        number = number * 58 + _BASE58_INDEX[c]
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")


@lru_cache(KEPT_IDS)
def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of a 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise RemoteProtocolError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return PeerId(base58_encode(_ED25519_PREFIX + public_key))


@lru_cache(KEPT_IDS)
def public_key_of(peer: str) -> bytes:
    """The Ed25519 public key inside a peer id. Raises RemoteProtocolError when there is none."""
    data = base58_decode(peer)
    if len(data) != 38 or not data.startswith(_ED25519_PREFIX):
        raise RemoteProtocolError(f"{peer[:60]!r} is not the peer id of an Ed25519 key (it starts with 12D3KooW)")
    return data[6:]


def short(name: str) -> str:
    """A peer id or CID for people: first and last characters (`12D3…k9fQ`)."""
    return name if len(name) <= 12 else f"{name[:4]}…{name[-4:]}" if name.startswith("12D3") else f"…{name[-8:]}"


def cid_of(codec: int, block: bytes | memoryview) -> Cid:
    """CIDv1 (sha2-256) of one block."""
    return cid_from_bytes(bytes((1, codec, 0x12, 32)) + hashlib.sha256(block).digest())


def cid_from_bytes(data: bytes) -> Cid:
    """Text form of binary CID bytes, checked by `cid_to_bytes`."""
    text = Cid("b" + base64.b32encode(data).decode("ascii").lower().rstrip("="))
    cid_to_bytes(text)
    return text


def cid_to_bytes(cid: str) -> bytes:
    """Binary form of a CIDv1 with sha2-256 (36 bytes).

    Raises:
      RemoteProtocolError: another base, version, codec or hash; wrong length; non-zero padding bits.
    """
    if not cid.startswith("b") or len(cid) != 59:
        raise RemoteProtocolError(f"{cid[:80]!r} is no base32 CIDv1 with sha2-256 (59 characters, starts with b)")
    try:
        data = base64.b32decode(cid[1:].upper() + "=" * (-len(cid[1:]) % 8))
    except ValueError as error:
        raise RemoteProtocolError(f"{cid!r} is not base32: {error}") from error
    if data[0] != 1 or data[1] not in (RAW, DAG_PB, DAG_CBOR) or data[2:4] != b"\x12\x20" or len(data) != 36:
        raise RemoteProtocolError(f"{cid!r} is not a CIDv1 of raw, dag-pb or dag-cbor with sha2-256")
    if "b" + base64.b32encode(data).decode("ascii").lower().rstrip("=") != cid:
        raise RemoteProtocolError(f"{cid!r} is not in its canonical spelling")
    return data


def cid_of_old(text: str) -> Cid:
    """The CIDv1 of a CIDv0 (`Qm…`, base58), which names the same dag-pb block; any other text is checked as CIDv1.

    Raises RemoteProtocolError.
    """
    if not text.startswith("Qm"):
        return cid_from_bytes(cid_to_bytes(text))
    data = base58_decode(text)
    if len(data) != 34 or data[:2] != b"\x12\x20":
        raise RemoteProtocolError(f"{text[:80]!r} is no CIDv0 (46 characters, starts with Qm)")
    return cid_from_bytes(bytes((1, DAG_PB)) + data)


def cid_codec(cid: str) -> int:
    """RAW, DAG_PB or DAG_CBOR."""
    return cid_to_bytes(cid)[1]


def cid_matches(cid: str, block: bytes | memoryview) -> bool:
    """Whether `block` hashes to `cid`."""
    return cid_to_bytes(cid)[4:] == hashlib.sha256(block).digest()
