"""Blocks and trees of files for tests, by name."""

from __future__ import annotations

import hashlib
from typing import Any

from protocols.car.messages import Block
from protocols.ids import RAW
from protocols.unixfs.builder import Builder, Tree
from protocols.unixfs.leaf import wrap


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes in which no two chunks are equal, the same ones every time."""
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


def numbered_cid(number: int) -> bytes:
    """The name of a raw block that is never looked into."""
    return bytes((1, RAW, 0x12, 32)) + number.to_bytes(32, "big")


def block(data: bytes, codec: int = RAW, *, old: bool = False) -> Block:
    return Block(bytes((1, codec, 0x12, 32)) + hashlib.sha256(data).digest(), data, old)


def tree_of(data: bytes, *, step: int = 100_000, **shape: Any) -> Tree:
    """The tree of a file that came in pieces of `step` bytes. `shape`: as for Builder."""
    builder = Builder(**shape)
    for start in range(0, len(data), step):
        builder.update(data[start : start + step])
    return builder.finish()


def blocks_of(data: bytes, **shape: Any) -> dict[bytes, bytes]:
    """Every block of a file by its name."""
    tree = tree_of(data, **shape)
    out = dict(tree.inner)
    for index, cid in enumerate(tree.leaves):
        offset, length = tree.layout.leaf_range(index)
        leaf = data[offset : offset + length]
        out[cid] = wrap(leaf) if tree.layout.wrapped else leaf
    return out
