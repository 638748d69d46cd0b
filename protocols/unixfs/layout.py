"""The shape of a balanced UnixFS tree follows from the file's size alone; this is its arithmetic.

Level 0 holds the leaves (raw blocks), the highest level holds the root. Everything but the hashes is known
beforehand: how many nodes, which bytes each covers, how long its encoding is, which sizes its links state.
A file of one chunk is its own root.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from protocols.errors import RemoteProtocolError
from protocols.unixfs.leaf import wrapped_bytes

CHUNK_BYTES: Final = 1 << 20  # 1 MiB: few hashes per file, still within Bitswap's 2 MiB per block
WIDTH: Final = 174  # links per inner node, the default of Kubo
MAX_FILE_BYTES: Final = 1 << 44  # 16 TiB: 4 levels of 174 links and 1 MiB chunks reach 900 TiB
MAX_LEAVES: Final = 1 << 24
CID_BYTES: Final = 36  # CIDv1, sha2-256, one-byte codec
OLD_CID_BYTES: Final = 34  # CIDv0: the bare multihash, always of a dag-pb block
_LINK_FIXED: Final = 2 + 2 + 1  # key and length of Hash, the empty Name field, key of Tsize


class Shape(NamedTuple):
    """How a file is cut and named; with its size it decides everything but the hashes."""

    chunk: int  # bytes per leaf; the last may be shorter
    width: int  # links per inner node; the last of a level may have fewer
    wrapped: bool = False  # leaves are dag-pb nodes around the bytes, not raw blocks
    old: bool = False  # links to dag-pb blocks are CIDv0


def _varint_bytes(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tree of a file of `size` bytes. Raises RemoteProtocolError for sizes nobody may ask for."""

    size: int  # bytes
    chunk: int = CHUNK_BYTES  # bytes per leaf; the last may be shorter
    width: int = WIDTH  # links per inner node; the last of a level may have fewer
    wrapped: bool = False  # leaves are dag-pb nodes around the bytes, not raw blocks
    old: bool = False  # links to dag-pb blocks are CIDv0

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_FILE_BYTES:
            raise RemoteProtocolError(f"a file of {self.size} bytes; the limit is {MAX_FILE_BYTES}")
        if not (1 <= self.chunk <= 1 << 21 and 2 <= self.width <= 1 << 13):
            raise RemoteProtocolError(f"chunks of {self.chunk} bytes and {self.width} links per node are not in use")
        if self.leaves > MAX_LEAVES:
            raise RemoteProtocolError(f"a file of {self.leaves} chunks; the limit is {MAX_LEAVES}")

    @property
    def leaves(self) -> int:
        """Number of leaves; an empty file has one, of no bytes."""
        return max(1, -(-self.size // self.chunk))

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of nodes per level, leaves first, 1 (the root) last."""
        out = [self.leaves]
        while out[-1] > 1:
            out.append(-(-out[-1] // self.width))
        return tuple(out)

    @property
    def depth(self) -> int:
        """Level of the root; 0 when the root is the only leaf."""
        return len(self.counts) - 1

    def leaf_range(self, index: int) -> tuple[int, int]:
        """(offset, length) in bytes of leaf `index`."""
        offset = index * self.chunk
        return offset, min(self.chunk, self.size - offset)

    def leaf_bytes(self, length: int) -> int:
        """Bytes of the block of a leaf that holds `length` bytes of the file."""
        return wrapped_bytes(length) if self.wrapped else length

    def block_bytes(self, level: int, index: int) -> int:
        """Bytes of the block of a node."""
        if level == 0:
            return self.leaf_bytes(self.leaf_range(index)[1])
        dag_pb = level > 1 or self.wrapped
        return node_bytes(self.links(level, index), OLD_CID_BYTES if self.old and dag_pb else CID_BYTES)

    def leaf_at(self, offset: int) -> int:
        """Index of the leaf that holds byte `offset`."""
        return offset // self.chunk

    def children(self, level: int, index: int) -> range:
        """Indices on level - 1 of the children of an inner node."""
        return range(index * self.width, min((index + 1) * self.width, self.counts[level - 1]))

    def file_bytes(self, level: int, index: int) -> int:
        """How many bytes of the file lie under a node."""
        reach: int = self.chunk * self.width**level
        return min(reach, self.size - index * reach)

    def links(self, level: int, index: int) -> tuple[tuple[int, int], ...]:
        """(Tsize, file bytes) of every link of an inner node.

        Tsize is the length of the child's encoding plus the Tsizes in it (dag-pb spec).
        """
        children = self.children(level, index)
        full = (self._tsize(level - 1, children[0]), self.file_bytes(level - 1, children[0]))
        last = (self._tsize(level - 1, children[-1]), self.file_bytes(level - 1, children[-1]))
        return (full,) * (len(children) - 1) + (last,)

    def _tsize(self, level: int, index: int) -> int:
        below = sum(tsize for tsize, _ in self.links(level, index)) if level else 0
        return self.block_bytes(level, index) + below


def node_bytes(links: tuple[tuple[int, int], ...], cid_bytes: int = CID_BYTES) -> int:
    """Length of the encoding of an inner node with these (Tsize, file bytes) links."""
    body = 0
    for tsize, _ in links:
        link = _LINK_FIXED + cid_bytes + _varint_bytes(tsize)
        body += 1 + _varint_bytes(link) + link
    data = 2 + 1 + _varint_bytes(sum(size for _, size in links)) + sum(1 + _varint_bytes(size) for _, size in links)
    return body + 1 + _varint_bytes(data) + data
