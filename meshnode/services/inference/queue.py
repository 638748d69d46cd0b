"""Questions of this node that wait until the chain has room: first come, first served, and no more than a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

import trio

from meshnode.core.errors import Declined
from meshnode.core.signal import Changes
from meshnode.core.sizes import counted
from meshnode.services.inference.receipt import Waiting

MAX_WAITING: Final = 256  # questions of one node
MOST_S: Final = 600.0  # that a question waits for room
UNSETTLED_S: Final = 180.0  # that one waits for a chain which is being rebuilt
SOON_MS: Final = 5_000  # a refusal that names no later time is about something that passes
PAUSE_S: Final = 1.0  # between two tries of the first in the line, where the stages name no time
ANSWER_S: Final = 10.0  # advised for each question before one that is refused; nobody knows better

_ROOM: Final = frozenset({"busy"})
_UNSETTLED: Final = frozenset({"fenced", "no-route", "not-ready", "engine-lost"})


class QuestionQueue:
    """The line. The first in it asks; it leaves when every stage has taken it, and the next one asks."""

    def __init__(self) -> None:
        self._line: deque[Place] = deque()
        self._moved = Changes()  # the line, or a question of ours is answered

    def __len__(self) -> int:
        """Questions in the line, the first of which is being tried."""
        return len(self._line)

    def join(self) -> Place:
        """A place at the end; use it as a context manager. Raises Declined `busy` when the line is too long."""
        if len(self._line) >= MAX_WAITING:
            raise Declined(
                "busy",
                f"{len(self._line)} questions wait at this node already, and no more may; ask again later",
                retry_ms=round(ANSWER_S * 1000),
            )
        place = Place(self._line, self._moved)
        self._line.append(place)
        return place


class Place:
    """One question in the line."""

    def __init__(self, line: deque[Place], moved: Changes) -> None:
        self._line = line
        self._moved = moved
        self._began = trio.current_time()

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        self._moved.notify()  # its sessions have ended: there may be room now

    async def turn(self) -> AsyncGenerator[Waiting, None]:
        """Until it is the first in the line; how many are before it meanwhile."""
        told = 0
        while before := self._line.index(self):
            if before != told:
                told = before
                yield Waiting(f"{counted(before, 'question is', 'questions are')} before this one")
            await self._moved.wait()

    def leave(self) -> None:
        """The question is taken, or given up; again is no harm."""
        if self in self._line:
            self._line.remove(self)
            self._moved.notify()

    def may_wait(self, error: Declined) -> bool:
        """Whether a refusal is about something that passes, and was not waited for too long already."""
        waited = trio.current_time() - self._began
        if self not in self._line:
            return False
        if error.code in _ROOM:
            return waited < MOST_S
        return error.code in _UNSETTLED and 0 < error.retry_ms <= SOON_MS and waited < UNSETTLED_S

    async def pause(self, error: Declined) -> None:
        """Until it is worth while to try again."""
        version = self._moved.version
        with trio.move_on_after(error.retry_ms / 1000 or PAUSE_S):
            await self._moved.wait(version)
