"""Work that is handed over by those who must not wait for it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVarTuple, Unpack

import trio

Args = TypeVarTuple("Args")
_Task = tuple[Callable[..., Awaitable[object]], tuple[Any, ...]]


class Tasks:
    """Takes work at any time, and does it while `run` does; each piece in a task of its own."""

    def __init__(self) -> None:
        self._send, self._waiting = trio.open_memory_channel[_Task](math.inf)

    def start_soon(self, task: Callable[[Unpack[Args]], Awaitable[object]], *args: *Args) -> None:
        """Have this done soon. How much may wait is the caller's business."""
        self._send.send_nowait((task, args))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled, or until a task raises. If cancelled: so is every task."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for task, args in self._waiting:
                nursery.start_soon(task, *args)
