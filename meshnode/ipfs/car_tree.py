"""The blocks of one file out of a CAR that a stranger sends while it is read (trustless gateway, `dag/export`).

A block is passed on when it is verified and belongs to the tree below the root that was asked for; nothing else
is. One section is in memory at a time, beside the names of the blocks that are still to come.
"""

from __future__ import annotations

from typing import Final

import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.core.sizes import format_size
from meshnode.ipfs.http import Body, HttpTrouble
from meshnode.ipfs.source_order import OnBlock, SourceFailed, WrongBlock
from protocols.car.machine import Reader
from protocols.car.messages import Block, DamagedBlock, Header
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_PB, Cid, cid_from_bytes, cid_to_bytes
from protocols.unixfs import node

BEGIN_S: Final = 6.0  # whoever has to look for a file first is better asked for its blocks one by one
CONTENT_TYPE: Final = "application/vnd.ipld.car"
SLACK_BYTES: Final = 4 << 20  # beside the file: header, names, inner nodes of a small one
INNER_SHARE: Final = 64  # inner nodes and names are less than a 64th of a file in chunks of 256 KiB


class UnusableCar(ContentUnavailable):
    """What came is no CAR of this file, though nothing in it was forged. The text is a clause about its sender."""


class CarTree:
    """`feed` what comes, take what `next` gives until it is None, `finish` at the end.

    All three raise RemoteProtocolError; it is not used again after that.
    """

    def __init__(self, root: bytes, size: int) -> None:
        """
        Args:
          root: binary CID of the file.
          size: its bytes, which bound those of the CAR.
        """
        self._reader = Reader()
        self._root = root
        self._due = {root}  # named by a block that came, or asked for
        self._seen: set[bytes] = set()
        self._limit = size + size // INNER_SHARE + SLACK_BYTES
        self._left = self._limit

    def feed(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise RemoteProtocolError(f"it is longer than {format_size(self._limit)}, which the file can't be")
        self._reader.feed(data)

    def next(self) -> Block | None:
        """The next block that was not there before; None: more bytes are needed."""
        while (item := self._reader.next()) is not None:
            if isinstance(item, Header):
                if self._root not in item.roots:
                    raise RemoteProtocolError("its root is another one")
            elif item.cid in self._due:
                self._due.remove(item.cid)
                self._seen.add(item.cid)
                self._due.update(cid for cid in _links(item) if cid not in self._seen)
                return item
            elif item.cid not in self._seen:
                raise RemoteProtocolError(f"the block {cid_from_bytes(item.cid)} in it belongs to something else")
        return None

    def finish(self) -> None:
        self._reader.finish()
        if self._due:
            raise RemoteProtocolError(f"{len(self._due)} blocks that it leads to are not in it")


def _links(block: Block) -> tuple[bytes, ...]:
    """What a block leads to; nothing for a leaf, and for a node that is no inner node of a file."""
    if block.cid[1] != DAG_PB:
        return ()
    try:
        return tuple(link.cid for link in node.decode(block.data).links)
    except RemoteProtocolError:
        return ()


async def take_tree(name: str, answer: Body, root: Cid, size: int, on_block: OnBlock, seconds: float) -> None:
    """Pass on the blocks of a file while they come.

    Args:
      name: who sends it, for errors.
      seconds: what the sender may take for each block; the time that `on_block` needs is ours.

    Raises WrongBlock (a block is forged), UnusableCar, SourceFailed (nothing came), ContentUnavailable (it broke
    off on the way). If cancelled: what was taken stays taken.
    """
    tree = CarTree(cid_to_bytes(root), size)
    came = False

    async def count(cid: bytes, data: bytes) -> None:
        nonlocal came
        came = True
        await on_block(cid, data)

    try:
        await _pump(answer, tree, count, seconds)
    except DamagedBlock as error:
        raise WrongBlock(f"{name} sent a CAR file with a forged block: {error}", cid=root) from error
    except RemoteProtocolError as error:
        raise UnusableCar(f"its CAR file can't be used: {error}", cid=root) from error
    except HttpTrouble as error:
        kind = ContentUnavailable if came else SourceFailed
        raise kind(f"{error}, in the middle of a CAR file", cid=root) from error
    try:
        tree.finish()
    except RemoteProtocolError as error:
        raise ContentUnavailable(f"{name} did not give all of {root}: {error}", cid=root) from error


async def _pump(answer: Body, tree: CarTree, on_block: OnBlock, seconds: float) -> None:
    left = seconds
    while True:
        began = trio.current_time()
        with trio.move_on_after(left) as limit:
            data = await answer.receive()
        if limit.cancelled_caught:
            raise HttpTrouble(f"no block came for {seconds:g} s")
        if not data:
            return
        left = max(0.0, left - (trio.current_time() - began))
        tree.feed(data)
        while (block := tree.next()) is not None:
            await on_block(block.cid, block.data)
            left = seconds
