"""The two things in a CAR file: its header and its sections (ipld.io/specs/transport/car/carv1).

The header is dag-cbor and always looks alike, so it is written and read here byte by byte: no other spelling
gets through, and no general decoder is let loose on a foreign file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, DAG_PB, RAW
from protocols.protobuf import put_varint

CID_BYTES: Final = 36  # CIDv1, one-byte codec, sha2-256
OLD_CID_BYTES: Final = 34  # CIDv0: the bare sha2-256 multihash of a dag-pb block
MAX_HEADER_BYTES: Final = 1 << 16
MAX_BLOCK_BYTES: Final = 2 << 20  # as in Bitswap
MAX_SECTION_BYTES: Final = CID_BYTES + MAX_BLOCK_BYTES
MAX_VARINT_BYTES: Final = 9  # github.com/multiformats/unsigned-varint
NO_CAR: Final = "this is no CAR file: "  # begins the words for a file that is something else

_BEFORE_ROOTS: Final = b"\xa2\x65roots"  # a map of two; its first key
_BEFORE_CID: Final = b"\xd8\x2a\x58\x25\x00"  # tag 42, 37 bytes, the zero that stands for the binary multibase
_BEFORE_VERSION: Final = b"\x67version"
_ONLY_VERSION: Final = b"\xa1" + _BEFORE_VERSION  # how CARv2 begins
_OLD_HEAD: Final = b"\x12\x20"
_NEW: Final = bytes((1, DAG_PB))  # before a CIDv0, it makes the CIDv1 of the same block
_CODECS: Final = (RAW, DAG_PB, DAG_CBOR)


class DamagedBlock(RemoteProtocolError):
    """The bytes of a block do not have the hash in its CID: whoever made the file lies, or it was damaged since."""


@dataclass(frozen=True, slots=True)
class Header:
    roots: tuple[bytes, ...]  # binary CIDs, at least one


@dataclass(frozen=True, slots=True)
class Block:
    cid: bytes  # binary CIDv1 with sha2-256, 36 bytes, however the file spells it
    data: bytes
    old: bool = False  # the file names this dag-pb block by its CIDv0


def check_cid(cid: bytes | bytearray) -> None:
    """Raise RemoteProtocolError unless these 36 bytes are the CIDv1 of a block that we can verify."""
    if not cid or cid[0] != 1:
        raise RemoteProtocolError(f"it names a block by a CID of the unknown version {cid[0] if cid else 'none'}")
    if len(cid) < CID_BYTES or cid[1] not in _CODECS or cid[2:4] != b"\x12\x20":
        raise RemoteProtocolError(
            f"it names a block by {bytes(cid[:8]).hex()}…, which is no CIDv1 of raw, dag-pb or dag-cbor with "
            "sha2-256 and can't be verified"
        )


def _array(count: int) -> bytes:
    if count < 24:
        return bytes((0x80 | count,))
    return bytes((0x98, count)) if count < 256 else b"\x99" + count.to_bytes(2, "big")


def _dag_cbor(roots: Sequence[bytes]) -> bytes:
    links = b"".join(_BEFORE_CID + cid for cid in roots)
    return _BEFORE_ROOTS + _array(len(roots)) + links + _BEFORE_VERSION + b"\x01"


def encode_header(header: Header) -> bytes:
    """The first bytes of a CAR file. Raises LocalProtocolError: no roots, too many, or a CID of another kind."""
    try:
        for cid in header.roots:
            check_cid(cid)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"A CAR file can't be written: {error}.") from None
    size = len(header.roots) * (len(_BEFORE_CID) + CID_BYTES) + 20
    if not header.roots or size > MAX_HEADER_BYTES or any(len(cid) != CID_BYTES for cid in header.roots):
        raise LocalProtocolError(f"A CAR file can't be written with {len(header.roots)} roots.")
    data = _dag_cbor(header.roots)
    return put_varint(len(data)) + data


def decode_header(data: bytes) -> Header:
    """Read the header without its length.

    Raises:
      RemoteProtocolError: another version, no roots, a root that is no CIDv1 with sha2-256, or not canonical.
    """
    if data.startswith(_ONLY_VERSION):
        version = data[len(_ONLY_VERSION)] if len(data) > len(_ONLY_VERSION) else 0
        if version == 2:
            raise RemoteProtocolError("it is a CAR of version 2; only version 1 is read, so export it as CARv1")
        raise RemoteProtocolError("its header names a version and no roots")
    if not data.startswith(_BEFORE_ROOTS):
        raise RemoteProtocolError(f"{NO_CAR}its header is not the dag-cbor of a CAR")
    at = len(_BEFORE_ROOTS)
    head = data[at : at + 3]
    count = (
        head[0] & 31 if head and head[0] < 0x98 else int.from_bytes(head[1 : 2 if head[:1] == b"\x98" else 3], "big")
    )
    at += len(_array(count))
    roots = []
    for _ in range(min(count, len(data) // CID_BYTES)):
        if data[at : at + len(_BEFORE_CID)] != _BEFORE_CID:
            raise RemoteProtocolError("a root in its header is no link to a CIDv1 with sha2-256")
        at += len(_BEFORE_CID)
        roots.append(data[at : at + CID_BYTES])
        check_cid(roots[-1])
        at += CID_BYTES
    if not roots:
        raise RemoteProtocolError("its header names no root")
    if data[at : at + len(_BEFORE_VERSION)] == _BEFORE_VERSION and data[at + len(_BEFORE_VERSION) :] != b"\x01":
        raise RemoteProtocolError("its header has roots, but a version other than 1")
    if _dag_cbor(roots) != data:
        raise RemoteProtocolError("its header is cut off or not canonical dag-cbor")
    return Header(tuple(roots))


def section_head(cid: bytes, size: int, *, old: bool = False) -> bytes:
    """What goes before the `size` bytes of a block. Raises LocalProtocolError: another CID, or too large."""
    fits = len(cid) == CID_BYTES and (cid[1] == DAG_PB or not old)
    if not fits or not 0 <= size <= MAX_BLOCK_BYTES:
        raise LocalProtocolError(
            f"A block of {size} bytes with a CID of {len(cid)} bytes does not go into a CAR file."
        )
    name = cid[len(_NEW) :] if old else cid
    return put_varint(len(name) + size) + name


def encode_block(block: Block) -> bytes:
    """One section. Raises LocalProtocolError: another CID, or too large."""
    return section_head(block.cid, len(block.data), old=block.old) + block.data


def decode_section(section: memoryview) -> Block:
    """Read a section without its length, and hash it.

    Raises:
      RemoteProtocolError: a CID that can't be verified.
      DamagedBlock: the bytes are not those that it names.
    """
    old = bytes(section[: len(_OLD_HEAD)]) == _OLD_HEAD
    start = OLD_CID_BYTES if old else CID_BYTES
    cid = (_NEW if old else b"") + bytes(section[:start])
    check_cid(cid)
    data = bytes(section[start:])
    if len(data) > MAX_BLOCK_BYTES:
        raise RemoteProtocolError(f"a block of {len(data)} bytes, the limit is {MAX_BLOCK_BYTES}")
    if hashlib.sha256(data).digest() != cid[4:]:
        raise DamagedBlock("a block is damaged: its bytes do not have the hash in its CID")
    return Block(cid, data, old)
