"""Where blocking work runs: in threads, or, in a simulation, in the event loop itself.

In virtual time a thread would stand outside of time: the clock would run on while it works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, TypeVarTuple, Unpack

import trio

Args = TypeVarTuple("Args")
Result = TypeVar("Result")


class Workers(Protocol):
    """Runs blocking calls for tasks."""

    async def run(
        self,
        call: Callable[[Unpack[Args]], Result],
        *args: *Args,
        limiter: trio.CapacityLimiter | None = None,
        abandon_on_cancel: bool = False,
    ) -> Result:
        """What the call returns or raises. `limiter`, `abandon_on_cancel`: as of `trio.to_thread.run_sync`.

        If cancelled: the call still runs to its end; unless it is abandoned, that is waited for.
        """


class Threads:
    """trio's worker threads."""

    async def run(
        self,
        call: Callable[[Unpack[Args]], Result],
        *args: *Args,
        limiter: trio.CapacityLimiter | None = None,
        abandon_on_cancel: bool = False,
    ) -> Result:
        return await trio.to_thread.run_sync(call, *args, limiter=limiter, abandon_on_cancel=abandon_on_cancel)


class Limited:
    """Others' threads, so many at a time at most."""

    def __init__(self, workers: Workers, most: int) -> None:
        self._workers = workers
        self._limiter = trio.CapacityLimiter(most)

    async def run(
        self,
        call: Callable[[Unpack[Args]], Result],
        *args: *Args,
        limiter: trio.CapacityLimiter | None = None,
        abandon_on_cancel: bool = False,
    ) -> Result:
        return await self._workers.run(
            call, *args, limiter=limiter or self._limiter, abandon_on_cancel=abandon_on_cancel
        )


class InLoop:
    """No thread: the call holds up everybody, and no time passes. For simulations."""

    async def run(
        self,
        call: Callable[[Unpack[Args]], Result],
        *args: *Args,
        limiter: trio.CapacityLimiter | None = None,
        abandon_on_cancel: bool = False,
    ) -> Result:
        await trio.lowlevel.checkpoint()
        return call(*args)
