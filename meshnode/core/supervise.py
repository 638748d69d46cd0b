"""A service owns one capability; `supervise` runs it again when the world failed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import trio

from meshnode.core.errors import TransientError
from meshnode.core.log import get_logger
from protocols.backoff import Backoff

_log = get_logger("service")


class Service(Protocol):
    """Owns one capability and its state.

    `run` opens its own nursery, reports `started()` when others may use it, and returns only when cancelled.
    """

    @property
    def name(self) -> str: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """When a failed service is run again. Seconds."""

    first: float = 0.5  # pause after the first failure; doubles with each further one
    cap: float = 60.0  # longest pause
    healthy: float = 120.0  # a run this long forgets earlier failures
    limit: int = 8  # failures in a row after which the error passes through


async def supervise(
    service: Service,
    restart: Restart = Restart(),
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a service; on TransientError pause and run it again. Anything else is a bug or fatal and passes through.

    `started()` is reported once, when the service is first ready. If cancelled: the service is cancelled.
    """
    backoff = Backoff(restart.first, restart.cap)
    started = False
    while True:
        began = trio.current_time()
        reasons: list[str] = []
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                if not started:
                    started = True
                    task_status.started()
        except* TransientError as group:
            if trio.current_time() - began >= restart.healthy:
                backoff.reset()
            pause = backoff.next()
            if backoff.failures >= restart.limit:
                raise
            reasons = [str(error) for error in _leaves(group)]
        if not reasons:
            return
        failures = backoff.failures
        _log.warning("service.restarted", service=service.name, failures=failures, reasons=reasons, pause_s=pause)
        await trio.sleep(pause)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    out: list[BaseException] = []
    for error in group.exceptions:
        out += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return out
