"""A file that is being put together from blocks, wherever they come from and in whatever order.

Begins with the root's CID and the size of the file; each inner node that arrives must be exactly the one
that the layout asks for at its place, and tells the names of the blocks below. A tree is therefore never
deeper or larger than its size allows, and a wrong one is refused at its root.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_PB, RAW, cid_to_bytes
from protocols.unixfs import leaf, node
from protocols.unixfs.layout import CHUNK_BYTES, WIDTH, Layout, Shape

KUBO_CHUNK_BYTES: Final = 1 << 18
# What we read: ours; Kubo with --cid-version=1; Helia; Kubo's default, and between that and --cid-version=1.
KNOWN_SHAPES: Final = (
    Shape(CHUNK_BYTES, WIDTH),
    Shape(KUBO_CHUNK_BYTES, 174),
    Shape(CHUNK_BYTES, 1024),
    Shape(KUBO_CHUNK_BYTES, 174, wrapped=True, old=True),
    Shape(KUBO_CHUNK_BYTES, 174, wrapped=True),
    Shape(KUBO_CHUNK_BYTES, 174, old=True),
)


@dataclass(slots=True)
class _Known:
    """A block that is known by name. Equal chunks share one name and stand in several places."""

    level: int  # 0 is a leaf
    size: int  # bytes of the block
    places: list[int] = field(default_factory=list)  # indices on its level
    filled: int = 0  # how many of the places have been filled

    @property
    def missing(self) -> bool:
        return self.filled < len(self.places)


class Assembly:
    """Which blocks of one file are known by name, which of them are here, where they belong."""

    def __init__(self, root: str, size: int) -> None:
        """Raises RemoteProtocolError when a file of this size cannot have such a root."""
        self.root = cid_to_bytes(root)
        self.done_bytes = 0  # bytes of the file whose leaves are here
        self._size = size
        self._layout: Layout | None = None
        self._known: dict[bytes, _Known] = {}
        self._missing: dict[bytes, None] = {self.root: None}
        if self.root[1] == RAW:
            self._layout = Layout(size)
            if self._layout.depth:
                raise RemoteProtocolError(
                    f"{root} is one raw block, which has at most {CHUNK_BYTES} bytes, but the file has {size}"
                )
            self._known[self.root] = _Known(0, size, [0])
        elif self.root[1] == DAG_PB:
            Layout(size)  # the limits
            if size <= KUBO_CHUNK_BYTES:  # a single leaf; an inner node has two chunks or more
                self._layout = Layout(size, KUBO_CHUNK_BYTES, wrapped=True)
                self._known[self.root] = _Known(0, self._layout.block_bytes(0, 0), [0])
        else:
            raise RemoteProtocolError(f"{root} is no UnixFS file (its codec is {self.root[1]:#x})")

    @property
    def layout(self) -> Layout | None:
        """The shape; None until the root is here."""
        return self._layout

    @property
    def complete(self) -> bool:
        return not self._missing

    def wanted(self) -> dict[bytes, int]:
        """CIDs that are known by name and missing -> bytes of the block.

        The size of the root of a large file is an upper bound.
        """
        return {cid: self.size_of(cid) for cid in self._missing}

    def wants(self, cid: bytes) -> bool:
        return cid in self._missing

    def size_of(self, cid: bytes) -> int:
        """Bytes that the block of a wanted CID must have; for an unknown root the upper bound."""
        known = self._known.get(cid)
        return node.MAX_NODE_BYTES if known is None else known.size

    def is_leaf(self, cid: bytes) -> bool:
        known = self._known.get(cid)
        return cid[1] == RAW if known is None else known.level == 0

    def content(self, cid: bytes, block: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
        """The bytes of the file in the block of a wanted leaf.

        Raises RemoteProtocolError when it can't be the block of its place.
        """
        if cid[1] == RAW or self._layout is None:
            return block
        return leaf.unwrap(block, self._layout.leaf_range(self._known[cid].places[0])[1])

    def unfilled(self, cid: bytes) -> list[tuple[int, int]]:
        """(index, file offset) of each place that a wanted leaf fills."""
        layout, known = self._layout, self._known.get(cid)
        if layout is None or known is None or known.level:
            return []
        return [(index, layout.leaf_range(index)[0]) for index in known.places[known.filled :]]

    def add_leaf(self, cid: bytes, length: int) -> None:
        """A wanted leaf whose hash was checked, a block of `length` bytes, is in its places.

        Raises RemoteProtocolError when its length is not that of its place: the tree lies about its sizes.
        """
        known, layout = self._known[cid], self._layout
        if layout is None or known.level or known.size != length:
            raise RemoteProtocolError(f"a leaf has {length} bytes, the tree states {known.size} for its place")
        self.done_bytes += layout.leaf_range(known.places[0])[1] * (len(known.places) - known.filled)
        known.filled = len(known.places)
        del self._missing[cid]

    def add_node(self, cid: bytes, block: bytes | bytearray | memoryview) -> dict[bytes, int]:
        """A wanted inner node whose hash was checked; returns the blocks that are wanted from now on.

        Raises RemoteProtocolError when it is not the node that belongs there: wrong sizes, another shape,
        leaves where inner nodes belong or the other way round. Nothing has changed then.
        """
        read = node.decode(block)
        stated = tuple((link.tsize, link.size) for link in read.links)
        layout = self._layout or self._recognise(read, stated)
        known = self._known.get(cid) or _Known(layout.depth, len(block), [0])
        if known.level == 0:
            raise RemoteProtocolError("an inner node stands where the tree has a leaf")
        if any(link.cid == cid for link in read.links):
            raise RemoteProtocolError("an inner node leads to itself")
        codec = DAG_PB if known.level > 1 or layout.wrapped else RAW
        if any(link.cid[1] != codec for link in read.links):
            raise RemoteProtocolError("a tree has leaves and inner nodes on the same level")
        if read.old != (layout.old and codec == DAG_PB):
            raise RemoteProtocolError("a tree names some of its nodes by CIDv0 and some by CIDv1")
        for index in known.places[known.filled :]:
            if layout.links(known.level, index) != stated:
                raise RemoteProtocolError("an inner node states sizes that do not belong to its place in the file")
        sizes: dict[bytes, int] = {}
        for link in read.links:
            old = self._known.get(link.cid)
            size = link.size if known.level == 1 else -link.size  # inner nodes: equal file bytes, equal block
            if sizes.setdefault(link.cid, size) != size or (old is not None and old.level != known.level - 1):
                raise RemoteProtocolError("one block stands in two places of a tree that differ in size or level")
            if old is not None and old.level == 0 and old.size != layout.leaf_bytes(link.size):
                raise RemoteProtocolError("one leaf stands in two places of a tree that differ in size")
        for index in known.places[known.filled :]:
            for link, child in zip(read.links, layout.children(known.level, index), strict=True):
                self._expect(layout, link.cid, known.level - 1, child)
        known.filled = len(known.places)
        self._known[cid] = known
        self._layout = layout
        del self._missing[cid]
        return {link.cid: self.size_of(link.cid) for link in read.links}

    def _expect(self, layout: Layout, cid: bytes, level: int, index: int) -> None:
        known = self._known.get(cid)
        if known is None:
            known = self._known[cid] = _Known(level, layout.block_bytes(level, index))
        known.places.append(index)
        self._missing[cid] = None

    def _recognise(self, root: node.Node, stated: tuple[tuple[int, int], ...]) -> Layout:
        for shape in KNOWN_SHAPES:
            layout = Layout(self._size, *shape)
            dag_pb = layout.depth > 1 or layout.wrapped
            if layout.depth and root.old == (layout.old and dag_pb) and layout.links(layout.depth, 0) == stated:
                return layout
        raise RemoteProtocolError(
            f"its root states {sum(size for _, size in stated)} bytes under {len(stated)} links; a file of "
            f"{self._size} bytes in chunks of 1 MiB or 256 KiB looks different"
        )
