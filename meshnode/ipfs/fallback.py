"""Blocks from outside the mesh: an IPFS daemon, HTTP gateways. Asked only for what no peer gives.

Nothing here is trusted: `Outside.block` hashes what a source gave before anybody sees it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.core.log import get_logger
from meshnode.core.service import Service
from protocols.bitswap.messages import MAX_BLOCK_BYTES
from protocols.ids import Cid, cid_matches, short

Result = TypeVar("Result")
Take = Callable[[bytes, bytes], Awaitable[None]]  # (binary CID, verified block)

FIRST_REST_SECONDS: Final = 5.0  # for a source that failed; doubles with each further failure
LAST_REST_SECONDS: Final = 300.0


class SourceFailed(ContentUnavailable):
    """A source can't be used now. The text is a clause that says what is wrong with it."""


class WrongBlock(ContentUnavailable):
    """A source gave bytes that are not the block it was asked for."""


class Source(Service, Protocol):
    """Somewhere outside the mesh that may have a block. `run` keeps it in order and closes its connections."""

    async def block(self, cid: Cid) -> bytes:
        """What it gives under this CID, at most MAX_BLOCK_BYTES, not verified.

        Raises ContentUnavailable (it does not have the block), SourceFailed (it can't be used now).
        If cancelled: the request is dropped.
        """

    async def tree(self, root: Cid, size: int, take: Take) -> None:
        """Hand over the blocks of a file of `size` bytes in one go, parents first, each verified.

        Raises ContentUnavailable (it does not have all of them or can't do this), SourceFailed, WrongBlock.
        If cancelled: what was taken stays taken.
        """

    def lied(self, cid: Cid) -> None:
        """Told when what it gave was not the block; it says so in the health of the node."""


def verified(name: str, cid: Cid, block: bytes) -> bytes:
    """The block, if it is the one that `cid` names. Raises WrongBlock, which says who gave it."""
    if len(block) > MAX_BLOCK_BYTES or not cid_matches(cid, block):
        raise WrongBlock(f"{name} gave {len(block)} bytes that are not the block {cid}", cid=cid)
    return block


@dataclass(slots=True, eq=False)
class _Round:
    """One question to the sources, while it is under way."""

    cid: Cid
    due: list[str]  # names of the sources that have not answered; the first one is being asked
    words: list[str] = field(default_factory=list)  # what the others said


class Outside:
    """Several sources as one: the one that gave a block last is asked first, a liar never again."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """`sources`: in the order in which they are asked at first."""
        self._sources = list(sources)
        self._failures: Counter[str] = Counter()  # in a row
        self._reasons: dict[str, str] = {}  # why a source rests
        self._lies: dict[str, str] = {}  # of sources that are not asked any more
        self._rounds: list[_Round] = []
        self._rests_until: dict[str, float] = {}
        self._log = get_logger("outside")
        self.bytes_from: Counter[str] = Counter()  # verified, by name of the source

    @property
    def names(self) -> tuple[str, ...]:
        """The sources that may still be asked, in their present order."""
        return tuple(source.name for source in self._sources)

    def so_far(self, cid: Cid) -> str:
        """What the sources have said to a question for this block that is still under way; empty without one."""
        for asked in self._rounds:
            if asked.cid == cid:
                last = [f"{name} was not asked yet" for name in asked.due[1:]]
                now = [f"{name} has not answered yet" for name in asked.due[:1]]
                return "; ".join((*asked.words, *now, *last))
        return ""

    async def block(self, cid: Cid) -> bytes:
        """One verified block from the first source that has it.

        Raises ContentUnavailable, which says what every source answered. If cancelled: nothing was kept.
        """

        async def ask(source: Source) -> bytes:
            block = verified(source.name, cid, await source.block(cid))
            self.bytes_from[source.name] += len(block)
            return block

        return await self._first(cid, ask, lambda: False)

    async def tree(self, root: Cid, size: int, take: Take) -> None:
        """The verified blocks of a whole file, parents first, from the first source that gives them in one go.

        Raises ContentUnavailable: some or all are still missing; ask for them one by one. A further source is
        only asked while none has come, for it would send everything again. If cancelled: what was taken stays.
        """
        taken = 0

        async def ask(source: Source) -> None:
            async def count(cid: bytes, data: bytes) -> None:
                nonlocal taken
                taken += 1
                self.bytes_from[source.name] += len(data)
                await take(cid, data)

            await source.tree(root, size, count)

        await self._first(root, ask, lambda: taken > 0)

    async def _first(
        self, cid: Cid, ask: Callable[[Source], Awaitable[Result]], enough: Callable[[], bool]
    ) -> Result:
        """What the first source gives that does; after a failure the others are asked unless that is `enough`."""
        sources = tuple(self._sources)
        this = _Round(cid, [source.name for source in sources], list(self._lies.values()))
        self._rounds.append(this)
        try:
            for source in sources:
                if enough():
                    break
                try:
                    result = await self._ask(source, cid, ask)
                except ContentUnavailable as error:
                    this.words.append(str(error))
                    this.due.pop(0)
                else:
                    self._prefer(source)
                    return result
        finally:
            self._rounds.remove(this)
        said = "; ".join(this.words) or "no source is left to ask"
        raise ContentUnavailable(f"no source outside the mesh gave {cid}: {said}", cid=cid)

    async def _ask(self, source: Source, cid: Cid, ask: Callable[[Source], Awaitable[Result]]) -> Result:
        """Raises ContentUnavailable with a clause that names the source."""
        name = source.name
        if trio.current_time() < self._rests_until.get(name, 0.0):
            raise ContentUnavailable(f"{name} failed a moment ago: {self._reasons[name]}", cid=cid)
        try:
            return await ask(source)
        except WrongBlock as error:
            self._drop(source, cid, str(error))
            raise
        except SourceFailed as error:
            self._rest(source, str(error))
            raise ContentUnavailable(f"{name}: {error}", cid=cid) from error
        except ContentUnavailable as error:
            raise ContentUnavailable(f"{name} does not have it", cid=cid) from error

    def _prefer(self, source: Source) -> None:
        self._failures.pop(source.name, None)
        self._rests_until.pop(source.name, None)
        if source in self._sources:  # it may have lied to another task meanwhile
            self._sources.remove(source)
            self._sources.insert(0, source)

    def _rest(self, source: Source, reason: str) -> None:
        if trio.current_time() < self._rests_until.get(source.name, 0.0):
            return  # several tasks asked it at once; that is one failure
        self._failures[source.name] += 1
        pause = min(LAST_REST_SECONDS, FIRST_REST_SECONDS * 2 ** (self._failures[source.name] - 1))
        self._rests_until[source.name] = trio.current_time() + pause
        self._reasons[source.name] = reason
        self._log.info("source.failed", source=source.name, reason=reason, pause_s=pause)

    def _drop(self, source: Source, cid: Cid, deed: str) -> None:
        if source in self._sources:
            self._lies[source.name] = f"{deed}, so it is not asked again"
            self._sources.remove(source)
            self._log.warning("source.lied", source=source.name, cid=short(cid))
            source.lied(cid)
