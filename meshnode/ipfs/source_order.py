"""Blocks from sources outside the mesh, an IPFS daemon or HTTP gateways, asked only for what no peer gives.

No source is trusted: what it gives is hashed here before anybody sees it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.core.log import get_logger
from meshnode.core.supervise import Service
from protocols.backoff import Backoff
from protocols.bitswap.messages import MAX_BLOCK_BYTES
from protocols.ids import Cid, cid_matches, short

Result = TypeVar("Result")
OnBlock = Callable[[bytes, bytes], Awaitable[None]]  # takes (binary CID, verified block)

FIRST_PAUSE_S: Final = 5.0  # for a source that failed
LAST_PAUSE_S: Final = 300.0

_log = get_logger("fallback")


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

    async def tree(self, root: Cid, size: int, on_block: OnBlock) -> None:
        """Hand over the blocks of a file of `size` bytes in one go, parents first, each verified.

        Raises ContentUnavailable (it does not have all of them or can't do this), SourceFailed, WrongBlock.
        If cancelled: what was taken stays taken.
        """

    def sent_bad_data(self, cid: Cid) -> None:
        """Told when what it gave was not the block; it says so in the health of the node."""


def verified(name: str, cid: Cid, block: bytes) -> bytes:
    """The block, if it is the one that `cid` names. Raises WrongBlock, which says who gave it."""
    if len(block) > MAX_BLOCK_BYTES or not cid_matches(cid, block):
        raise WrongBlock(f"{name} gave {len(block)} bytes that are not the block {cid}", cid=cid)
    return block


class _Candidate:
    """A source, and how it has done."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = source.name
        self.backoff = Backoff(FIRST_PAUSE_S, LAST_PAUSE_S)
        self.not_before = 0.0
        self.failure = ""  # the last one

    def fail(self, reason: str) -> None:
        if trio.current_time() < self.not_before:
            return  # several tasks asked it at the same time; that is one failure
        pause = self.backoff.next()
        self.not_before = trio.current_time() + pause
        self.failure = reason
        _log.info("source.failed", source=self.name, reason=reason, pause_s=pause)

    def succeed(self) -> None:
        self.backoff.reset()
        self.not_before = 0.0


@dataclass(slots=True, eq=False)
class _Question:
    """One question to the sources, while it is under way."""

    cid: Cid
    due: list[str]  # names of the sources that have not answered; the first one is being asked
    words: list[str] = field(default_factory=list)  # what the others said


class Fallback:
    """Several sources as one: the one that gave a block last is asked first; one that sent bad data never again."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """`sources`: in the order in which they are asked at first."""
        self._candidates = [_Candidate(source) for source in sources]
        self._excluded: dict[str, str] = {}  # sources that are not asked any more, and what they did
        self._questions: list[_Question] = []
        self.bytes_from: Counter[str] = Counter()  # verified, by name of the source

    @property
    def names(self) -> tuple[str, ...]:
        """The sources that may still be asked, in their present order."""
        return tuple(candidate.name for candidate in self._candidates)

    def so_far(self, cid: Cid) -> str:
        """What the sources have said to a question for this block that is still under way; empty without one."""
        for question in self._questions:
            if question.cid == cid:
                last = [f"{name} was not asked yet" for name in question.due[1:]]
                now = [f"{name} has not answered yet" for name in question.due[:1]]
                return "; ".join((*question.words, *now, *last))
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

    async def tree(self, root: Cid, size: int, on_block: OnBlock) -> None:
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
                await on_block(cid, data)

            await source.tree(root, size, count)

        await self._first(root, ask, lambda: taken > 0)

    async def _first(
        self, cid: Cid, ask: Callable[[Source], Awaitable[Result]], enough: Callable[[], bool]
    ) -> Result:
        """What the first source gives that does; after a failure the others are asked unless that is `enough`."""
        candidates = tuple(self._candidates)
        question = _Question(cid, [one.name for one in candidates], list(self._excluded.values()))
        self._questions.append(question)
        try:
            for candidate in candidates:
                if enough():
                    break
                try:
                    result = await self._ask(candidate, cid, ask)
                except ContentUnavailable as error:
                    question.words.append(str(error))
                    question.due.pop(0)
                else:
                    self._prefer(candidate)
                    return result
        finally:
            self._questions.remove(question)
        said = "; ".join(question.words) or "no source is left to ask"
        raise ContentUnavailable(f"no source outside the mesh gave {cid}: {said}", cid=cid)

    async def _ask(self, candidate: _Candidate, cid: Cid, ask: Callable[[Source], Awaitable[Result]]) -> Result:
        """Raises ContentUnavailable with a clause that names the source."""
        name = candidate.name
        if trio.current_time() < candidate.not_before:
            raise ContentUnavailable(f"{name} failed a moment ago: {candidate.failure}", cid=cid)
        try:
            return await ask(candidate.source)
        except WrongBlock as error:
            self._exclude(candidate, cid, str(error))
            raise
        except SourceFailed as error:
            candidate.fail(str(error))
            raise ContentUnavailable(f"{name}: {error}", cid=cid) from error
        except ContentUnavailable as error:
            raise ContentUnavailable(f"{name} does not have it", cid=cid) from error

    def _prefer(self, candidate: _Candidate) -> None:
        candidate.succeed()
        if candidate in self._candidates:  # another task may have excluded it meanwhile
            self._candidates.remove(candidate)
            self._candidates.insert(0, candidate)

    def _exclude(self, candidate: _Candidate, cid: Cid, what: str) -> None:
        if candidate in self._candidates:
            self._excluded[candidate.name] = f"{what}, so it is not asked again"
            self._candidates.remove(candidate)
            _log.warning("source.bad_data", source=candidate.name, cid=short(cid))
            candidate.source.sent_bad_data(cid)
