"""Random files and hostile nodes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.unixfs.builder import Builder
from protocols.unixfs.layout import Layout, node_bytes
from protocols.unixfs.leaf import unwrap, wrap, wrapped_bytes
from protocols.unixfs.node import Link, Node, decode, encode

cids = st.binary(min_size=32, max_size=32).map(lambda digest: bytes((1, 0x55, 0x12, 32)) + digest)
links = st.builds(
    lambda cid, size, more: Link(cid, size + more, size), cids, st.integers(1, 1 << 30), st.integers(0, 999)
)
nodes = st.lists(links, min_size=1, max_size=20).map(lambda items: Node(tuple(items)))
old_nodes = nodes.map(
    lambda it: Node(tuple(Link(b"\x01\x70" + link.cid[2:], link.tsize, link.size) for link in it.links), old=True)
)


@given(nodes | old_nodes)
@settings(max_examples=100)
def test_nodes_survive_the_wire(node: Node) -> None:
    block = encode(node)
    assert decode(block) == node
    assert len(block) == node_bytes(tuple((link.tsize, link.size) for link in node.links), 34 if node.old else 36)


@given(nodes | old_nodes, st.data())
@settings(max_examples=150)
def test_a_damaged_node_is_refused_or_differs(node: Node, data: st.DataObject) -> None:
    block = bytearray(encode(node))
    cut = data.draw(st.integers(0, len(block) - 1))
    for damaged in (
        bytes(block[:cut]),
        bytes(block[:cut]) + bytes((block[cut] ^ 1 << data.draw(st.integers(0, 7)),)) + bytes(block[cut + 1 :]),
    ):
        try:
            assert decode(damaged) != node
        except RemoteProtocolError:
            continue


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_random_bytes_are_refused(data: bytes) -> None:
    try:
        assert encode(decode(data)) == data
    except RemoteProtocolError:
        return


@given(st.integers(0, 1 << 44), st.sampled_from([(1 << 20, 174), (1 << 18, 174), (1 << 20, 1024)]))
@settings(max_examples=100)
def test_arithmetic_adds_up(size: int, shape: tuple[int, int]) -> None:
    if size > shape[0] << 24:
        return
    layout = Layout(size, *shape)
    assert sum(part for _, part in layout.links(layout.depth, 0)) == size if layout.depth else layout.leaves == 1
    assert layout.file_bytes(layout.depth, 0) == size
    last = layout.leaves - 1
    offset, length = layout.leaf_range(last)
    assert offset + length == size and (0 < length <= layout.chunk or size == 0)


@given(st.binary(max_size=3000), st.integers(1, 90), st.integers(2, 5), st.integers(1, 500))
@settings(max_examples=60)
def test_builder_is_independent_of_the_pieces(data: bytes, chunk: int, width: int, step: int) -> None:
    whole, pieces = Builder(chunk=chunk, width=width), Builder(chunk=chunk, width=width)
    whole.update(data)
    for start in range(0, len(data), step):
        pieces.update(data[start : start + step])
    assert whole.finish() == pieces.finish()


@given(st.binary(max_size=300), st.data())
@settings(max_examples=150)
def test_a_wrapped_leaf_gives_its_bytes_and_nothing_else_does(data: bytes, draw: st.DataObject) -> None:
    block = wrap(data)
    assert unwrap(block, len(data)) == data and len(block) == wrapped_bytes(len(data))
    cut = draw.draw(st.integers(0, len(block) - 1))
    flipped = block[:cut] + bytes((block[cut] ^ 1 << draw.draw(st.integers(0, 7)),)) + block[cut + 1 :]
    for damaged in (block[:cut], flipped, draw.draw(st.binary(max_size=320))):
        try:
            assert wrap(unwrap(damaged, len(data))) == damaged
        except RemoteProtocolError:
            continue
