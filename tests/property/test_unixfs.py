"""Trees of random files, and hostile bytes: sizes that lie, cycles, depth, width, other kinds of UnixFS.

A cycle can't be hashed, so an assembly is handed nodes under names that are not theirs: whoever breaks the hash
(or forgets to check it) must not be able to make it walk for ever.
"""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_PB, RAW, Cid, cid_from_bytes
from protocols.unixfs.assembly import Assembly
from protocols.unixfs.layout import MAX_FILE_BYTES, Layout
from protocols.unixfs.leaf import unwrap, wrap, wrapped_bytes
from protocols.unixfs.node import MAX_LINKS, MAX_NODE_BYTES, Link, Node, decode, encode
from tests.hostile import HUGE_NUMBERS, cost, mutated, varint
from tests.trees import block as block_named
from tests.trees import blocks_of, noise, tree_of


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


@given(st.integers(0, 900).map(noise), st.integers(1, 90), st.integers(2, 5), st.integers(1, 500))
@settings(max_examples=60)
@pytest.mark.slow
@pytest.mark.long
def test_builder_is_independent_of_the_pieces(data: bytes, chunk: int, width: int, step: int) -> None:
    shape = {"chunk": chunk, "width": width}
    assert tree_of(data, **shape, step=step) == tree_of(data, **shape, step=len(data) or 1)


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


MIB = 1 << 20
CALLS_PER_LINK = 60
LEAF = bytes((1, RAW, 0x12, 32)) + bytes(range(32))


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def number(key: int, value: int) -> bytes:
    return varint(key << 3) + varint(value)


def link(cid: bytes = LEAF, tsize: int | None = 100, name: bytes | None = b"") -> bytes:
    body = field(1, cid) + (b"" if name is None else field(2, name))
    return field(2, body + (b"" if tsize is None else number(3, tsize)))


def data(sizes: tuple[int, ...], total: int | None = None, kind: int = 2, more: bytes = b"") -> bytes:
    total = sum(sizes) if total is None else total
    return field(1, number(1, kind) + number(3, total) + b"".join(number(4, size) for size in sizes) + more)


GOOD = link() + link(tsize=7) + data((100, 7))
FOREIGN = {
    "a folder": link(name=b"a") + field(1, number(1, 1)),
    "a symbolic link": field(1, number(1, 4) + field(2, b"/etc/passwd")),
    "raw of old times": link() + data((100,), kind=0),
    "metadata": link() + data((100,), kind=3),
    "a HAMT shard": link(name=b"00") + field(1, number(1, 5) + field(2, b"\x01") + number(5, 0x22) + number(6, 256)),
    "a file with a mode": link() + data((100,), more=number(7, 0o755)),
    "a file with a time": link() + data((100,), more=field(8, number(1, 0))),
    "bytes beside links": link() + field(1, number(1, 2) + field(2, b"xyz") + number(3, 103) + number(4, 100)),
    "data first": data((100, 7)) + link() + link(tsize=7),
    "no links": data(()),
    "sizes packed": link() + link(tsize=7) + field(1, number(1, 2) + number(3, 107) + field(4, b"\x64\x07")),
    "Tsize before the hash": field(2, number(3, 100) + field(1, LEAF) + field(2, b"")) + data((100,)),
    "the hash twice": field(2, field(1, LEAF) + field(1, LEAF) + field(2, b"") + number(3, 100)) + data((100,)),
    "no hash": field(2, field(2, b"") + number(3, 100)) + data((100,)),
    "no name": link(name=None) + data((100,)),
    "no Tsize": link(tsize=None) + data((100,)),
    "a field after Tsize": field(2, field(1, LEAF) + field(2, b"") + number(3, 100) + number(4, 1)) + data((100,)),
    "an identity hash": link(b"\x01\x55\x00\x05hello") + data((100,)),
    "an identity hash of 60 KiB": link(b"\x01\x55\x00" + varint(60_000) + bytes(60_000)) + data((100,)),
    "a hash of 64 bytes": link(b"\x01\x55\x13\x40" + bytes(64)) + data((100,)),
    "blake3": link(b"\x01\x55\x1e\x20" + bytes(32)) + data((100,)),
    "dag-cbor": link(b"\x01\x71\x12\x20" + bytes(32)) + data((100,)),
    "a codec of many bytes": link(b"\x01" + b"\xff" * 9 + b"\x01\x12\x20" + bytes(32)) + data((100,)),
    "a CIDv0 of 20 bytes": link(b"\x12\x14" + bytes(20)) + data((100,)),
    "a CIDv0 with something behind": link(b"\x12\x20" + bytes(33)) + data((100,)),
    "a CIDv1 around a CIDv0": link(b"\x01\x12\x20" + bytes(32)) + data((100,)),
    "a CIDv0 and no old node besides": link(b"\x12\x20" + bytes(32)) + link(bytes((1, DAG_PB, 18, 32)) + bytes(32))
    + data((100, 100)),
    "a group": b"\x0b\x0c",
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_inner_node_of_a_file(what: str) -> None:
    assert encode(decode(GOOD)) == GOOD
    spent = cost(lambda: decode(FOREIGN[what]), RemoteProtocolError)
    assert spent.refused and spent.calls < 400 and spent.peak < MIB


@pytest.mark.parametrize("size", [*HUGE_NUMBERS, 0, 1 << 70])
def test_sizes_that_lie(size: int) -> None:
    blocks = (
        link(tsize=size) + data((100,), total=size),
        link() + link() + data((size, 7)),
        link() + link() + data((size, (1 << 64) - size if size < 1 << 64 else 1)),  # their sum is 0 in 64 bits
        link() + link() + data((100, 7), total=size),
        link() * 3 + data((100, size)),
    )
    for block in blocks:
        spent = cost(lambda block=block: decode(block), RemoteProtocolError)  # type: ignore[misc]
        assert spent.calls < 400 and spent.peak < MIB
        if not spent.refused:
            assert 0 < spent.result.size <= MAX_FILE_BYTES


@pytest.mark.parametrize("tsize", HUGE_NUMBERS)
def test_a_tsize_may_be_any_number_but_fits_no_file(tsize: int) -> None:
    block = link(tsize=tsize) * 2 + data((100, 100))
    with suppress(RemoteProtocolError):
        assert {one.tsize for one in decode(block).links} == {tsize}
    assembly = Assembly(cid_from_bytes(block_named(block, DAG_PB).cid), 2 * MIB)
    with pytest.raises(RemoteProtocolError):
        assembly.add_node(assembly.root, block)


FLOODS = {
    "100,000 links in 2 MiB": field(2, field(1, b"\x12\x20" + bytes(14)))[:21] * 100_000,
    "as many links as fit": (link() * (MAX_NODE_BYTES // len(link())))[: MAX_NODE_BYTES - 2],
    "empty links": field(2, b"") * (MAX_NODE_BYTES // 2),
    "fields of one link": field(2, b"\x18\x01" * (MAX_NODE_BYTES // 2 - 8)),
    "names of one link": field(2, b"\x12\x00" * (MAX_NODE_BYTES // 2 - 8)),
    "sizes": field(1, b"\x20\x01" * (MAX_NODE_BYTES // 2 - 8)),
    "types": field(1, b"\x08\x02" * (MAX_NODE_BYTES // 2 - 8)),
    "totals": field(1, b"\x18\x02" * (MAX_NODE_BYTES // 2 - 8)),
    "unknown fields": b"\x78\x01" * (MAX_NODE_BYTES // 2),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_node_full_of_small_things(flood: str) -> None:
    spent = cost(lambda: decode(FLOODS[flood]), RemoteProtocolError)
    assert spent.refused and spent.calls < CALLS_PER_LINK * MAX_LINKS and spent.peak < 8 * MIB


def test_the_widest_node_that_is_read() -> None:
    block = encode(Node(tuple(Link(LEAF, 5, 5) for _ in range(MAX_LINKS))))
    spent = cost(lambda: decode(block), RemoteProtocolError)
    assert len(spent.result.links) == MAX_LINKS
    assert spent.calls < CALLS_PER_LINK * MAX_LINKS and spent.peak < 16 * MIB


@given(mutated(st.binary(max_size=200).map(wrap)), st.sampled_from([0, 1, 40, 200, 1 << 18, 1 << 40]))
@settings(max_examples=150)
def test_injured_leaves(block: bytes, length: int) -> None:
    with suppress(RemoteProtocolError):
        assert wrap(unwrap(block, length)) == block


# ------------------------------------------------------------ trees


def layers(size: int) -> tuple[Assembly, Layout]:
    """A file of several levels whose root is still to come."""
    return Assembly(cid_from_bytes(bytes((1, DAG_PB, 0x12, 32)) + bytes(32)), size), Layout(size)


def node_at(layout: Layout, level: int, index: int, cid: bytes) -> bytes:
    """The node that belongs there, all its links leading to the same name."""
    return encode(Node(tuple(Link(cid, *sizes) for sizes in layout.links(level, index))))


def test_a_root_that_leads_to_itself() -> None:
    assembly, layout = layers(174 * 174 * MIB)
    block = node_at(layout, layout.depth, 0, assembly.root)
    spent = cost(lambda: _walk(assembly, {assembly.root: block}), RemoteProtocolError)
    assert "leads to itself" in spent.refused
    assert not assembly.complete and spent.calls < 20_000 and spent.peak < MIB


def test_two_nodes_that_lead_to_one_another() -> None:
    assembly, layout = layers(174 * 174 * 174 * MIB)
    other = bytes((1, DAG_PB, 0x12, 32)) + bytes(31) + b"\x01"
    blocks = {assembly.root: node_at(layout, 3, 0, other), other: node_at(layout, 2, 0, assembly.root)}
    spent = cost(lambda: _walk(assembly, blocks), RemoteProtocolError)
    assert not assembly.complete and spent.calls < 600_000 and spent.peak < 2 * MIB


def _walk(assembly: Assembly, blocks: dict[bytes, bytes]) -> None:
    """Give what is wanted as long as there is any."""
    while found := [cid for cid in assembly.wanted() if cid in blocks]:
        for cid in found:
            assembly.add_node(cid, blocks[cid])


def test_a_chain_of_10_000_nodes_is_refused_at_its_first() -> None:
    """No file in one of the known shapes has an inner node with a single link, so no chain begins."""
    cid, size, below = LEAF, MIB, MIB
    for _ in range(10_000):
        block = encode(Node((Link(cid, below, size),)))
        cid, below = block_named(block, DAG_PB).cid, below + len(block)
    for stated in (size, 2 * MIB, 1 << 40):
        assembly = Assembly(cid_from_bytes(cid), stated)
        with pytest.raises(RemoteProtocolError):
            assembly.add_node(assembly.root, block)
        assert len(assembly.wanted()) == 1


def test_a_bomb_of_one_chunk_costs_what_its_places_cost() -> None:
    """174 x 174 places, one block: memory follows from the size that was asked for, not from the depth."""
    size = 174 * 174 * MIB
    assembly, layout = layers(size)
    middle = bytes((1, DAG_PB, 0x12, 32)) + b"\x01" * 32
    blocks = {assembly.root: node_at(layout, 2, 0, middle), middle: node_at(layout, 1, 0, LEAF)}
    spent = cost(lambda: _walk(assembly, blocks), RemoteProtocolError)
    assert assembly.wanted() == {LEAF: MIB} and len(assembly.unfilled(LEAF)) == 174 * 174
    assert spent.peak < 100 * 174 * 174 and spent.calls < 40 * 174 * 174


SMALL = bytes(3 << 18) + b"end"
TREE, BLOCKS = tree_of(SMALL, chunk=1 << 18), blocks_of(SMALL, chunk=1 << 18)


@given(st.sampled_from(sorted(BLOCKS)), st.binary(max_size=30), st.integers(0, 1 << 20), st.integers(0, 1 << 41))
@settings(max_examples=80)
def test_blocks_that_do_not_belong_never_complete_a_file(cid: bytes, noise: bytes, cut: int, size: int) -> None:
    """Whatever is handed in under a wanted name: refused, or the file stays what its layout says."""
    assembly = Assembly(TREE.root, size) if size > 1 << 18 else Assembly(TREE.root, (3 << 18) + 3)
    root = BLOCKS[assembly.root]
    with suppress(RemoteProtocolError):
        assembly.add_node(assembly.root, root[:cut] + noise + root[cut:])
    if assembly.wants(cid):
        with suppress(RemoteProtocolError):
            if assembly.is_leaf(cid):
                assembly.add_leaf(cid, len(BLOCKS[cid]) + len(noise))
            else:
                assembly.add_node(cid, noise + BLOCKS[cid])
    assert not assembly.complete
    assert assembly.done_bytes <= (3 << 18) + 3


@given(st.binary(min_size=36, max_size=36), st.integers(-(1 << 70), 1 << 70))
@settings(max_examples=100)
def test_any_root_with_any_size(cid: bytes, size: int) -> None:
    name = "b" + "a" * 58
    with suppress(RemoteProtocolError):
        name = cid_from_bytes(cid)
    for root in (name, TREE.root, cid_from_bytes(LEAF), Cid("Qm" + "a" * 44), Cid("")):
        spent = cost(lambda root=root: Assembly(root, size), RemoteProtocolError)  # type: ignore[misc]
        assert spent.calls < 300 and spent.peak < MIB
