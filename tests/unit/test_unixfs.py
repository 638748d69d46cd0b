"""The tree of a file: CIDs that other tools compute, arithmetic of the layout, strict reading of nodes."""

from __future__ import annotations

import hashlib
from typing import Any

import aleph_cid
import pytest

from protocols.errors import RemoteProtocolError
from protocols.ids import cid_from_bytes, cid_of_old
from protocols.unixfs.assembly import KNOWN_SHAPES, Assembly
from protocols.unixfs.builder import Tree, file_cid
from protocols.unixfs.layout import Layout, Shape, node_bytes
from protocols.unixfs.leaf import unwrap, wrap
from protocols.unixfs.node import Link, Node, decode, encode
from tests.trees import blocks_of, tree_of
from tests.vectors import Case, hold

KUBO_CHUNK = 1 << 18  # the oracle has no option for the chunk size


def pattern(size: int) -> bytes:
    """Bytes that differ from chunk to chunk."""
    block = hashlib.sha256(size.to_bytes(8, "big")).digest() * 64
    return b"".join(i.to_bytes(4, "big") + block[4:] for i in range(-(-size // 2048)))[:size]


@pytest.mark.parametrize("old", [False, True], ids=["ours", "the default of Kubo"])
@pytest.mark.parametrize(
    "size",
    [0, 1, KUBO_CHUNK - 1, KUBO_CHUNK, KUBO_CHUNK + 1, 174 * KUBO_CHUNK, 174 * KUBO_CHUNK + 1, 175 * KUBO_CHUNK],
)
def test_root_equals_the_independent_oracle(size: int, old: bool) -> None:
    data = pattern(size)
    oracle = aleph_cid.CidHasher.for_ipfs() if old else aleph_cid.CidHasher.for_ipfs_v1_raw_leaves()
    oracle.update(data)
    assert tree_of(data, chunk=KUBO_CHUNK, wrapped=old, old=old).root == cid_of_old(oracle.finalize())


def test_our_chunk_size_gives_the_known_roots() -> None:
    assert file_cid(b"") == "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
    assert file_cid(b"hello\n") == "bafkreicysg23kiwv34eg2d7qweipxwosdo2py4ldv42nbauguluen5v6am"


@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 9, 10, 27, 28, 81, 82])
def test_layout_foresees_every_node(leaves: int) -> None:
    data = pattern(leaves * 64 - 7)
    tree = tree_of(data, chunk=64, width=3)
    layout = tree.layout
    assert len(tree.inner) == sum(layout.counts[1:])
    blocks = iter(tree.inner)
    for level in range(1, layout.depth + 1):
        for index in range(layout.counts[level]):
            _, block = next(blocks)
            node = decode(block)
            assert tuple((link.tsize, link.size) for link in node.links) == layout.links(level, index)
            assert len(block) == node_bytes(layout.links(level, index))
            assert node.size == layout.file_bytes(level, index)
    ranges = [layout.leaf_range(i) for i in range(layout.leaves)]
    assert sum(length for _, length in ranges) == len(data)
    assert all(layout.leaf_at(offset) == i for i, (offset, _) in enumerate(ranges))


def test_layout_of_absurd_sizes_is_refused() -> None:
    for size in (-1, 1 << 45, 1 << 70):
        with pytest.raises(RemoteProtocolError):
            Layout(size)
    with pytest.raises(RemoteProtocolError):
        Layout(1 << 40, 1)  # 2**40 leaves


def put_together(data: bytes, **shape: Any) -> Tree:
    """Feed an assembly with the blocks of a file, the last wanted one first."""
    tree, blocks = tree_of(data, **shape), blocks_of(data, **shape)
    assembly = Assembly(tree.root, len(data))
    out = bytearray(len(data))
    while not assembly.complete:
        cid = list(assembly.wanted())[-1]
        block = blocks[cid]
        if assembly.is_leaf(cid):
            assert assembly.size_of(cid) == len(block)
            content = assembly.content(cid, block)
            for _, offset in assembly.unfilled(cid):
                out[offset : offset + len(content)] = content
            assembly.add_leaf(cid, len(block))
        else:
            assembly.add_node(cid, block)
    assert assembly.done_bytes == len(data)
    assert out == data
    return tree


@pytest.mark.parametrize("size", [0, 5, 1 << 20, (1 << 20) + 1, 3 << 20, (3 << 20) + 17])
def test_assembly_puts_a_file_together(size: int) -> None:
    put_together(pattern(size))


@pytest.mark.parametrize("size", [3 << 20, (350 << 18) + 5])
def test_equal_chunks_arrive_once_and_fill_every_place(size: int) -> None:
    put_together(bytes(size), chunk=1 << 18)


@pytest.mark.parametrize("shape", KNOWN_SHAPES[3:], ids=["default", "wrapped", "old names"])
@pytest.mark.parametrize("size", [0, 5, 1 << 18, (1 << 18) + 1, 3 << 20, (350 << 18) + 5])
def test_assembly_reads_what_kubo_makes(size: int, shape: Shape) -> None:
    if size <= 1 << 18 and not shape.wrapped:
        return  # raw and small: nothing of the shape is left
    tree = put_together(pattern(size), **shape._asdict())
    blocks = iter(tree.inner)
    for level in range(1, tree.layout.depth + 1):
        for index in range(tree.layout.counts[level]):
            assert len(next(blocks)[1]) == tree.layout.block_bytes(level, index)


def test_a_leaf_that_lies_about_its_bytes_is_refused() -> None:
    """The right length and the right hash, but not the node that belongs there."""
    data = pattern(300)
    block = wrap(data).replace(b"\x08\x02", b"\x08\x00", 1)
    root = cid_from_bytes(bytes((1, 0x70, 0x12, 32)) + hashlib.sha256(block).digest())
    assembly = Assembly(root, 300)
    with pytest.raises(RemoteProtocolError, match="canonical"):
        assembly.content(assembly.root, block)
    with pytest.raises(RemoteProtocolError):
        unwrap(wrap(data), 301)
    assert not assembly.complete


def test_assembly_refuses_a_wrong_size() -> None:
    data = pattern(3 << 20)
    tree = tree_of(data)
    for size in ((3 << 20) - 1, (3 << 20) + 1, 1, 1 << 40):
        assembly = Assembly(tree.root, size)
        with pytest.raises(RemoteProtocolError):
            assembly.add_node(*tree.inner[-1])
        assert not assembly.complete
    with pytest.raises(RemoteProtocolError):
        Assembly(file_cid(b"small"), 2 << 20)
    with pytest.raises(RemoteProtocolError):
        small = Assembly(file_cid(b"small"), 6)
        small.add_leaf(small.root, 5)


def test_a_tree_that_names_itself_or_mixes_levels_is_refused() -> None:
    """A hash cycle can't be made, but a tree may name inner nodes where leaves belong."""
    size = 2 << 20
    inner = bytes((1, 0x70, 0x12, 32)) + bytes(32)
    leaf = bytes((1, 0x55, 0x12, 32)) + bytes(32)
    for cids in ((inner, inner), (leaf, inner)):
        links = tuple(
            Link(cid, tsize, part) for cid, (tsize, part) in zip(cids, Layout(size).links(1, 0), strict=True)
        )
        block = encode(Node(links))
        root = cid_from_bytes(bytes((1, 0x70, 0x12, 32)) + hashlib.sha256(block).digest())
        assembly = Assembly(root, size)
        with pytest.raises(RemoteProtocolError, match="same level"):
            assembly.add_node(assembly.root, block)
    tree = tree_of(pattern(size))
    assembly = Assembly(tree.root, size)
    assembly.add_node(*tree.inner[-1])
    with pytest.raises(RemoteProtocolError, match="where the tree has a leaf"):
        assembly.add_node(tree.leaves[0], tree.inner[-1][1])


LEAF = bytes((1, 0x55, 0x12, 32)) + bytes(range(32))
_OLD = encode(Node((Link(b"\x01\x70" + LEAF[2:], 100, 100),) * 2, old=True))
_NEW = encode(Node((Link(b"\x01\x70" + LEAF[2:], 100, 100),) * 2))
_MIXED = _OLD[: 2 + _OLD[1]] + _NEW[2 + _NEW[1] :]  # a link of the one, then a link of the other
GOOD = encode(Node((Link(LEAF, 100, 100), Link(LEAF, 7, 7))))
LIES = {
    "no data": GOOD[: GOOD.rindex(b"\x0a")],
    "another total": GOOD.replace(b"\x18\x6b", b"\x18\x6c"),
    "a folder": GOOD.replace(b"\x08\x02\x18", b"\x08\x01\x18"),
    "data twice": GOOD + b"\x0a\x00",
    "tsize below size": encode(Node((Link(LEAF, 99, 100),))),
    "nothing under a link": encode(Node((Link(LEAF, 0, 0),))),
    "sha3": GOOD.replace(LEAF, bytes((1, 0x55, 0x16, 32)) + bytes(range(32))),
    "a multihash that is too long": GOOD.replace(LEAF, b"\x12\x20" + bytes(34)),
    "both cid versions": _MIXED,
    "a size is missing": GOOD[:-2].replace(b"\x0a\x08\x08\x02", b"\x0a\x06\x08\x02"),
    "a named link": GOOD.replace(b"\x12\x2a\x0a", b"\x12\x2b\x0a").replace(b"\x12\x00", b"\x12\x01a"),
    "long varint": GOOD.replace(b"\x18\x07", b"\x18\x87\x00").replace(b"\x12\x2a\x0a", b"\x12\x2b\x0a"),
    "empty": b"",
}


def test_vectors() -> None:
    two_levels = Layout(175 << 20)
    wide = Node(tuple(Link(b"\x01\x70" + LEAF[2:], *sizes) for sizes in two_levels.links(2, 0)))
    old = Node((Link(b"\x01\x70" + LEAF[2:], 114, 100), Link(b"\x01\x70" + LEAF[2:], 15, 7)), old=True)
    nodes = {
        "two leaves": Node((Link(LEAF, 100, 100), Link(LEAF, 7, 7))),
        "root over inner nodes": wide,
        "cid version 0": old,
    }
    cases = [Case(name, encode(node), node) for name, node in nodes.items()]
    hold("unixfs", [*cases, *(Case(name, data) for name, data in LIES.items())], decode)


def test_a_node_above_the_limit_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError, match="limit"):
        decode(bytes((1 << 20) + 1))
