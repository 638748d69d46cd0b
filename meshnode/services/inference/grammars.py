"""Grammars of the sessions whose tokens are drawn here: a limited process follows them, and not the node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from meshnode.core.errors import ContentUnavailable, Declined, DiskError, ModelError, TokenizerLost
from meshnode.model.release import ServedRelease
from meshnode.services.inference.tokenizers import TokenizerShelf
from meshnode.services.port import Content, OpenSpan, Releases
from meshnode.text.port import NO_GRAMMAR, Guide, OpenTokenizer
from protocols.pipe.messages import Grammar

GOODBYE_S: Final = 3.0  # for the end of the process


class Course:
    """The way of one answer along its grammar. Its tokens come one after the other; nothing is taken back."""

    def __init__(self, guide: Guide, eos: frozenset[int]) -> None:
        """`eos`: tokens that end an answer."""
        self._guide = guide
        self._eos = eos
        self._next: int | None = None  # position of the token that comes next

    async def mask(self, position: int) -> bytes:
        """Which tokens may come at this position, as engines take it. Raises Declined `fenced`, or as a Guide."""
        if self._next is not None and position != self._next:
            raise Declined(
                "fenced",
                f"an answer with a grammar goes on at position {self._next}, and not at {position}; ask again",
            )
        return await self._guide.mask()

    async def follow(self, position: int, tokens: Sequence[int]) -> None:
        """Go along what was drawn elsewhere, the first of it at this position. Raises as `mask`.

        Masks are waited for, because a guide gives one before it takes a token.
        """
        for place, token in enumerate(tokens, position):
            await self.mask(place)
            await self.take(place, token)

    async def take(self, position: int, token: int) -> None:
        """What was drawn there. If cancelled: the session is over."""
        self._next = position + 1
        if token not in self._eos:
            await self._guide.take(token)


class GrammarService:
    """Holds the process for the model that is served, opened when the first grammar comes."""

    name = "grammars"

    def __init__(self, releases: Releases, content: Content, open_tokenizer: OpenTokenizer) -> None:
        self._releases = releases
        self._shelf = TokenizerShelf(content, open_tokenizer, grammars=True)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ends the process with the node."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await self._shelf.let_go()

    @asynccontextmanager
    async def lent(self, served: OpenSpan, grammar: Grammar | None) -> AsyncIterator[Course | None]:
        """A grammar for one session on a span, ready to be followed; None for none.

        Raises Declined `bad-grammar` with what is wrong with it; `no-grammar` where grammars can't be used.
        """
        if grammar is None:
            yield None
            return
        release = self._release(served)
        try:
            guide = await (await self._shelf.of(release)).guide(grammar.kind, grammar.text)
        except (ContentUnavailable, ModelError, DiskError, TokenizerLost) as error:
            raise Declined(NO_GRAMMAR, f"this node can't use grammars: {error}") from error
        try:
            yield Course(guide, frozenset(release.manifest.architecture.eos_ids))
        finally:
            guide.close()

    def _release(self, served: OpenSpan) -> ServedRelease:
        for release in (self._releases.current, self._releases.previous):
            if release is not None and release.cid == served.span.manifest:
                return release
        raise Declined(NO_GRAMMAR, "the model of these layers is served no more; ask again")
