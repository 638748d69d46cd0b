"""The blocks of one file out of a foreign CAR: what belongs to it is taken, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.ipfs.car_tree import CarTree
from protocols.car.messages import Block, DamagedBlock, Header, encode_block, encode_header
from protocols.errors import RemoteProtocolError
from protocols.ids import RAW, cid_of, cid_to_bytes
from protocols.unixfs.builder import Tree
from tests.hostile import mutated
from tests.trees import blocks_of, noise, tree_of

CHUNK = 100
SHAPE = {"chunk": CHUNK, "width": 6}  # a file of three levels
DATA = noise(CHUNK * 40 + 7)
TREE, BLOCKS = tree_of(DATA, **SHAPE), blocks_of(DATA, **SHAPE)
ROOT = TREE.inner[-1][0]


def parents_first(tree: Tree) -> list[bytes]:
    """Level by level, which gateways that say `order=unk` may do."""
    return [*(cid for cid, _ in reversed(tree.inner)), *tree.leaves]


def car(cids: Sequence[bytes], blocks: dict[bytes, bytes] = BLOCKS, root: bytes = ROOT) -> bytes:
    parts = [encode_header(Header((root,)))]
    parts += [encode_block(Block(cid, blocks[cid])) for cid in cids]
    return b"".join(parts)


def read(data: bytes, size: int = len(DATA), root: bytes = ROOT, piece: int = 1000) -> Iterator[Block]:
    reader = CarTree(root, size)
    for at in range(0, len(data), piece):
        reader.feed(data[at : at + piece])
        while (block := reader.next()) is not None:
            yield block
    reader.finish()


@pytest.mark.parametrize("piece", [1, 37, 1 << 20])
def test_every_block_once_however_often_it_comes(piece: int) -> None:
    cids = parents_first(TREE)
    assert [block.cid for block in read(car(cids), piece=piece)] == cids
    assert [block.cid for block in read(car([cid for cid in cids for _ in range(3)]), piece=piece)] == cids


def test_leaves_that_are_nodes_themselves() -> None:
    tree, blocks = tree_of(DATA, **SHAPE, wrapped=True), blocks_of(DATA, **SHAPE, wrapped=True)
    cids = parents_first(tree)
    root = tree.inner[-1][0]
    assert [block.data for block in read(car(cids, blocks, root), root=root)] == [blocks[cid] for cid in cids]


def test_what_does_not_belong_to_it_ends_it() -> None:
    cids = parents_first(TREE)
    other = b"something else"
    name = cid_to_bytes(cid_of(RAW, other))
    for data, why in (
        (car([*cids[:3], name, *cids[3:]], {**BLOCKS, name: other}), "belongs to something else"),
        (car(list(reversed(cids))), "belongs to something else"),  # a child before its parent
        (car(cids, root=cids[1]), "another one"),
        (car(cids[:-1]), "1 blocks that it leads to are not in it"),
        (car([]), "1 blocks that it leads to"),
        (car(cids)[:-1], "ends within"),
        (b"", "ends within its header"),
        (bytes(100), "no bytes"),
    ):
        with pytest.raises(RemoteProtocolError, match=why):
            list(read(data))


def test_a_forged_block_is_told_apart() -> None:
    data = bytearray(car(parents_first(TREE)))
    data[-3] ^= 1
    with pytest.raises(DamagedBlock, match="at byte"):
        list(read(bytes(data)))


def test_it_has_an_end() -> None:
    """The same block for ever."""
    size = 100
    reader = CarTree(ROOT, size)
    reader.feed(car(parents_first(TREE)[:1]))
    again = encode_block(Block(ROOT, BLOCKS[ROOT])) * 1000
    fed = 0
    with pytest.raises(RemoteProtocolError, match="longer than"):
        while fed < 1 << 30:
            reader.feed(again)
            fed += len(again)
            while reader.next() is not None:
                pass
    assert fed < 8 << 20


@settings(max_examples=150)
@given(mutated(st.just(car(parents_first(TREE)))) | st.binary(max_size=300), st.integers(1, 5000))
def test_whatever_happens_on_the_way_no_other_block_comes_out(bad: bytes, piece: int) -> None:
    seen = []
    try:
        for block in read(bad, piece=piece):
            assert block.data == BLOCKS[block.cid]
            seen.append(block.cid)
    except RemoteProtocolError:
        pass
    else:
        assert set(seen) == set(BLOCKS)
    assert len(seen) == len(set(seen))
