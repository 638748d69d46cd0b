"""Ready is said only after a token has really passed through the whole chain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from meshnode.core.errors import Declined, TransientError
from meshnode.core.health import Health

PROBE_SECONDS: Final = 20.0  # a probe that takes longer has failed
AGAIN_SECONDS: Final = 60.0  # an unchanged chain is probed this often
RETRY_SECONDS: Final = 1.0  # after a failure, doubling up to the above

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Readiness:
    """What is known about the chain."""

    ready: bool
    sentence: str  # why not, or how long the probe token took
    probe_ms: float = 0.0


class ReadinessService:
    """Sends a probe token whenever the chain has changed, and once a minute."""

    name = "readiness"

    def __init__(
        self,
        *,
        chain: Callable[[], tuple[object, str]],
        changed: Callable[[], Awaitable[object]],
        probe: Callable[[], Awaitable[None]],
        health: Health,
    ) -> None:
        """
        Args:
          chain: what a probe would pass through (compared for changes), or None with the reason in words.
          changed: waits for the next change of the view.
          probe: passes one token through the chain; raises Declined or TransientError.
        """
        self._chain = chain
        self._changed = changed
        self._probe = probe
        self._health = health
        self.now = Readiness(False, "this node has just started")
        self._turned = trio.Event()
        self._pause = trio.CancelScope()

    def doubt(self, reason: str) -> None:
        """Something that the chain needs has just failed: not ready, until another probe token came back."""
        if self.now.ready:
            self._say(Readiness(False, f"the chain has just broken: {reason}"))
        self._pause.cancel()

    def look_again(self) -> None:
        """Something came back that a failed probe may have missed: do not wait for the next one."""
        if not self.now.ready:
            self._pause.cancel()

    async def wait_ready(self) -> None:
        """Until the chain answers. If cancelled: nothing happened."""
        while not self.now.ready:
            await self._turned.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe until cancelled."""
        task_status.started()
        retry = RETRY_SECONDS  # the pause after the next failure
        while True:
            pause = AGAIN_SECONDS
            found = chain, why = self._chain()
            if chain is None:
                self._say(Readiness(False, why))
                self._health.clear("probe-failed")
                retry = RETRY_SECONDS
            elif await self._try():
                retry = RETRY_SECONDS
            else:
                pause, retry = retry, min(AGAIN_SECONDS, 2 * retry)
            with trio.move_on_after(pause) as self._pause:
                while self._chain() == found:
                    await self._changed()

    async def _try(self) -> bool:
        """One probe; whether it came back."""
        began = trio.current_time()
        reason = f"no probe token came back within {PROBE_SECONDS:.0f} s"
        try:
            with trio.fail_after(PROBE_SECONDS):
                await self._probe()
        except (Declined, TransientError, trio.TooSlowError) as error:
            if not isinstance(error, trio.TooSlowError):
                reason = str(error)
            self._say(Readiness(False, f"the probe failed: {reason}"))
            self._health.set("probe-failed", reason=reason)
            return False
        took_ms = (trio.current_time() - began) * 1000
        self._health.clear("probe-failed")
        self._say(Readiness(True, f"a probe token passed through the chain in {took_ms:.0f} ms", took_ms))
        return True

    def _say(self, readiness: Readiness) -> None:
        if readiness.ready != self.now.ready:
            log.info("chain.changed", ready=readiness.ready, why=readiness.sentence)
        self.now = readiness
        self._turned.set()
        self._turned = trio.Event()
