"""A span that an engine has open."""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshnode.engine.port import Engine, StageReport
from protocols.advert.messages import Span


class OpenSpan:
    """Layers that are loaded and compute. Sessions enter and leave; a span that was replaced ends when they have."""

    def __init__(self, engine: Engine, span: Span, incarnation: Callable[[], int], report: StageReport) -> None:
        """`incarnation`: of the node now, as routes name it."""
        self.engine = engine
        self.span = span
        self._incarnation = incarnation
        self.report = report
        self.lost = ""  # why its engine is gone; empty while it is not
        self._sessions = 0
        self._empty = trio.Event()
        self._empty.set()

    @property
    def incarnation(self) -> int:
        """Of the node, as routes name it."""
        return self._incarnation()

    @property
    def memory_bytes(self) -> int:
        """What it may take: weights, and keys and values of all sessions."""
        return self.report.weight_bytes + self.engine.spec.max_kv_bytes

    def enter(self) -> None:
        """A session begins on it."""
        self._sessions += 1
        if self._sessions == 1:
            self._empty = trio.Event()

    def leave(self) -> None:
        """A session ended."""
        self._sessions -= 1
        if not self._sessions:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Until no session is open. If cancelled: nothing happened."""
        await self._empty.wait()
