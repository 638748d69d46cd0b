"""Ready is said only after a token has really passed through the whole chain."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import trio

from meshnode.core.errors import Declined, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.net.port import Host
from meshnode.policy.route import NoRoute
from meshnode.services.inference.receipt import Generator, Request
from meshnode.services.inference.router import Router
from meshnode.services.port import Pipes
from protocols.backoff import Backoff
from protocols.ids import PeerId, short
from protocols.pipe.messages import Sampling

PROBE_S: Final = 20.0  # a probe that takes longer has failed
AGAIN_S: Final = 60.0  # an unchanged chain is probed this often
RETRY_S: Final = 1.0  # after a failure, doubling up to the above
PROBE: Final = Request(
    (1, 1), 1, Sampling(seed=0), heal_s=0
)  # any two token ids: what is proven is that the chain answers

_log = get_logger("readiness")


@dataclass(frozen=True, slots=True)
class Readiness:
    """What is known about the chain."""

    ready: bool
    sentence: str  # why not, or how long the probe token took
    probe_ms: float = 0.0


class ReadinessService:
    """Sends a probe token whenever the chain has changed, and once a minute."""

    name = "readiness"

    def __init__(self, router: Router, origin: Generator, host: Host, pipes: Pipes, health: Health) -> None:
        self._router = router
        self._origin = origin
        self._host = host
        self._health = health
        self.now = Readiness(False, "this node has just started")
        self.changes = Changes()  # of `now`
        self._pause = trio.CancelScope()
        pipes.on_lost(self._peer_lost)

    async def wait_ready(self) -> None:
        """Until the chain answers. If cancelled: nothing happened."""
        while not self.now.ready:
            await self.changes.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe until cancelled."""
        backoff = Backoff(RETRY_S, AGAIN_S)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_peers)
            for changes in self._router.changes:
                nursery.start_soon(self._follow, changes)
            task_status.started()
            while True:
                pause = AGAIN_S
                self._seen = chain = self._router.usual()
                if isinstance(chain, NoRoute):
                    self._say(Readiness(False, chain.reason))
                    self._health.clear("probe-failed")
                    backoff.reset()
                elif await self._probe():
                    backoff.reset()
                else:
                    pause = backoff.next()
                with trio.move_on_after(pause) as self._pause:
                    if self._router.usual() == chain:
                        await trio.sleep_forever()

    async def _follow(self, changes: Changes) -> None:
        while True:
            await changes.wait()
            if self._router.usual() != self._seen:
                self._pause.cancel()

    async def _follow_peers(self) -> None:
        """Somebody came (back) whom a failed probe may have missed: do not wait for the next one."""
        async with self._host.events() as events:
            async for event in events:
                if event.connected and not self.now.ready:
                    self._pause.cancel()

    def _peer_lost(self, peer: PeerId, reason: str) -> None:
        """Not ready without a peer of the chain, until another probe token came back."""
        chain = self._router.usual()
        if isinstance(chain, NoRoute) or all(hop.peer != peer for hop in chain):
            return
        if self.now.ready:
            self._say(Readiness(False, f"the chain has just broken: {short(peer)} went away: {reason}"))
        self._pause.cancel()

    async def _probe(self) -> bool:
        """Pass one token through the chain; whether it came back."""
        began = trio.current_time()
        reason = f"no probe token came back within {PROBE_S:.0f} s"
        try:
            with trio.fail_after(PROBE_S):
                async with aclosing(self._origin.generate(PROBE)) as pieces:
                    async for _ in pieces:
                        pass
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
            _log.info("chain.changed", ready=readiness.ready, why=readiness.sentence)
        self.now = readiness
        self.changes.notify()
