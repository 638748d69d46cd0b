"""Bytes of a file in, its tree out: the leaves while they stream by, the inner nodes at the end.

The root CID equals `ipfs add --cid-version=1 --raw-leaves --chunker=size-1048576`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from protocols.ids import DAG_PB, RAW, Cid, cid_from_bytes
from protocols.unixfs.layout import CHUNK_BYTES, WIDTH, Layout
from protocols.unixfs.leaf import wrap
from protocols.unixfs.node import Link, Node, encode

_RAW_HEAD = bytes((1, RAW, 0x12, 32))
_DAG_PB_HEAD = bytes((1, DAG_PB, 0x12, 32))


@dataclass(frozen=True, slots=True)
class Tree:
    """A whole file: its shape, the CID of every leaf, and the blocks of all inner nodes."""

    layout: Layout
    leaves: tuple[bytes, ...]  # binary CIDs in file order
    inner: tuple[tuple[bytes, bytes], ...]  # (binary CID, block), lowest level first; the last is the root

    @property
    def root(self) -> Cid:
        return cid_from_bytes(self.inner[-1][0] if self.inner else self.leaves[0])


def tree_of(layout: Layout, leaves: tuple[bytes, ...]) -> Tree:
    """Build the inner nodes over the leaves' CIDs."""
    level, below, inner = 0, list(leaves), []
    while len(below) > 1:
        level += 1
        above = []
        for index in range(layout.counts[level]):
            sizes = layout.links(level, index)
            cids = (below[i] for i in layout.children(level, index))
            links = tuple(Link(cid, tsize, size) for cid, (tsize, size) in zip(cids, sizes, strict=True))
            block = encode(Node(links, layout.old and links[0].cid[1] == DAG_PB))
            above.append(_DAG_PB_HEAD + hashlib.sha256(block).digest())
            inner.append((above[-1], block))
        below = above
    return Tree(layout, leaves, tuple(inner))


class Builder:
    """Takes a file piece by piece, keeps one digest per chunk. Pieces that are whole chunks are not copied."""

    def __init__(
        self, *, chunk: int = CHUNK_BYTES, width: int = WIDTH, wrapped: bool = False, old: bool = False
    ) -> None:
        """The arguments are those of `Shape`. Wrapped leaves are kept in memory, one at a time."""
        self._chunk = chunk
        self._width = width
        self._old = old
        self._leaf = bytearray() if wrapped else None
        self._size = 0
        self._leaves: list[bytes] = []
        self._hash = hashlib.sha256()
        self._filled = 0  # bytes in the chunk being hashed

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next bytes of the file, as many as there are."""
        view = memoryview(data)
        self._size += len(view)
        while len(view):
            piece = view[: self._chunk - self._filled]
            if self._leaf is None:
                self._hash.update(piece)
            else:
                self._leaf += piece
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == self._chunk:
                self._close_leaf()

    def _close_leaf(self) -> None:
        if self._leaf is None:
            self._leaves.append(_RAW_HEAD + self._hash.digest())
            self._hash = hashlib.sha256()
        else:
            self._leaves.append(_DAG_PB_HEAD + hashlib.sha256(wrap(self._leaf)).digest())
            self._leaf.clear()
        self._filled = 0

    def finish(self) -> Tree:
        """The tree of everything that was added."""
        if self._filled or not self._leaves:
            self._close_leaf()
        layout = Layout(self._size, self._chunk, self._width, self._leaf is not None, self._old)
        return tree_of(layout, tuple(self._leaves))


def file_cid(data: bytes | memoryview) -> Cid:
    """The root CID of a small file that is in memory."""
    builder = Builder()
    builder.update(data)
    return builder.finish().root
