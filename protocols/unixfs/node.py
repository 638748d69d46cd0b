"""Inner nodes of a file: a dag-pb node whose data says "UnixFS file" and the size under each link.

Sources: ipld.io/specs/codecs/dag-pb (links before data, Hash, Name, Tsize in this order) and
specs.ipfs.tech/unixfs (Data: Type 1, filesize 3, blocksizes 4). One node has exactly one encoding here:
`decode` re-encodes what it read and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_PB, RAW
from protocols.protobuf import as_bytes, as_int, fields, put_field, put_varint
from protocols.unixfs.layout import CID_BYTES, MAX_FILE_BYTES, OLD_CID_BYTES

MAX_NODE_BYTES: Final = 1 << 20  # 8192 links need 0.5 MB; ours with 174 links have 9 KB
MAX_LINKS: Final = 1 << 13
_FILE: Final = 2  # UnixFS DataType File
_LINK_FIELDS: Final = 3  # Hash, Name, Tsize
_OLD_HEAD: Final = b"\x12\x20"
_CID_HEADS: Final = (bytes((1, RAW, 0x12, 32)), bytes((1, DAG_PB, 0x12, 32)))


@dataclass(frozen=True, slots=True)
class Link:
    cid: bytes  # binary CIDv1 of a raw or dag-pb block, 36 bytes, however the node spells it
    tsize: int  # bytes of all blocks from the child down, with their encodings
    size: int  # bytes of the file under the child


@dataclass(frozen=True, slots=True)
class Node:
    links: tuple[Link, ...]  # in file order
    old: bool = False  # its links to dag-pb blocks are spelled as CIDv0

    @property
    def size(self) -> int:
        """Bytes of the file under this node."""
        return sum(link.size for link in self.links)


def encode(node: Node) -> bytes:
    """The block of an inner node. Raises LocalProtocolError above the limits."""
    if not 1 <= len(node.links) <= MAX_LINKS:
        raise LocalProtocolError(f"an inner node has {len(node.links)} links, allowed are 1 to {MAX_LINKS}")
    out = []
    data = [put_field(1, _FILE), put_field(3, node.size)]
    for link in node.links:
        name = link.cid[2:] if node.old and link.cid[1] == DAG_PB else link.cid
        body = put_field(1, name) + b"\x12\x00" + put_field(3, link.tsize)
        out.append(put_field(2, body))
        data.append(put_field(4, link.size))
    unixfs = b"".join(data)
    out.append(b"\x0a" + put_varint(len(unixfs)) + unixfs)
    return b"".join(out)


def _link(view: memoryview) -> tuple[bytes, int, bool]:
    cid, tsize = b"", -1
    for number, value in fields(view, _LINK_FIELDS):
        if number == 1:
            cid = bytes(as_bytes(number, value))
        elif number == 2:
            if len(as_bytes(number, value)):
                raise RemoteProtocolError("a link of a file has a name; only links of folders have one")
        elif number == 3:
            tsize = as_int(number, value)
        else:
            raise RemoteProtocolError(f"a dag-pb link has the unknown field {number}")
    if len(cid) == OLD_CID_BYTES and cid[:2] == _OLD_HEAD:
        return bytes((1, DAG_PB)) + cid, tsize, True
    if len(cid) != CID_BYTES or cid[:4] not in _CID_HEADS:
        name = cid[:40].hex() or "nothing"
        raise RemoteProtocolError(f"a link names {name}, not a raw or dag-pb CID with sha2-256")
    return cid, tsize, False


def _sizes(view: memoryview) -> tuple[int, list[int]]:
    kind, total, sizes = -1, -1, []
    for number, value in fields(view, MAX_LINKS + 2):
        if number == 1:
            kind = as_int(number, value)
        elif number == 3:
            total = as_int(number, value)
        elif number == 4:
            sizes.append(as_int(number, value))
            if len(sizes) > MAX_LINKS:
                raise RemoteProtocolError(f"an inner node states more than {MAX_LINKS} sizes")
        elif number == 2:
            raise RemoteProtocolError("an inner node carries bytes of the file itself; only leaves do that")
        else:
            raise RemoteProtocolError(f"an inner node has the UnixFS field {number}, which files do not use")
    if kind != _FILE:
        raise RemoteProtocolError(f"a UnixFS node has the type {kind}; only files ({_FILE}) are read")
    return total, sizes


def decode(block: bytes | bytearray | memoryview) -> Node:
    """Read the block of an inner node.

    Raises:
      RemoteProtocolError: no dag-pb, no UnixFS file, sizes that do not add up, a limit, or another encoding
        than the canonical one.
    """
    if len(block) > MAX_NODE_BYTES:
        raise RemoteProtocolError(f"an inner node of {len(block)} bytes; the limit is {MAX_NODE_BYTES}")
    links: list[tuple[bytes, int, bool]] = []
    unixfs: memoryview | None = None
    for number, value in fields(memoryview(block), MAX_LINKS + 1):
        if number == 2:
            links.append(_link(as_bytes(number, value)))
            if len(links) > MAX_LINKS:
                raise RemoteProtocolError(f"an inner node has more than {MAX_LINKS} links")
        elif number == 1 and unixfs is None:
            unixfs = as_bytes(number, value)
        else:
            raise RemoteProtocolError(f"a dag-pb node has the field {number} that it must not have (again)")
    if unixfs is None:
        raise RemoteProtocolError("a dag-pb node has no UnixFS data")
    total, sizes = _sizes(unixfs)
    if len(sizes) != len(links) or not links:
        raise RemoteProtocolError(f"an inner node has {len(links)} links and {len(sizes)} sizes")
    if min(sizes) < 1 or sum(sizes) != total or total > MAX_FILE_BYTES:
        raise RemoteProtocolError(f"an inner node states {total} bytes, its links add up to {sum(sizes)}")
    pairs = zip(links, sizes, strict=True)
    node = Node(tuple(Link(cid, tsize, size) for (cid, tsize, _), size in pairs), any(old for *_, old in links))
    if any(link.tsize < link.size for link in node.links):
        raise RemoteProtocolError("a link states a Tsize below the bytes of the file under it")
    if encode(node) != block:
        raise RemoteProtocolError("an inner node is not in canonical dag-pb (it decodes, but encodes differently)")
    return node
