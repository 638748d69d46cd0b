"""Ready is said after a probe token has passed, and taken back when the chain breaks; in virtual time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.model.fit import facts_of
from meshnode.model.release import ServedRelease
from meshnode.net.port import PeerEvent
from meshnode.policy.route import NoRoute
from meshnode.services.inference.readiness import AGAIN_S, PROBE_S, Readiness, ReadinessService
from meshnode.services.inference.receipt import Piece, Receipt, Request
from meshnode.sim.model import ModelSpec, make_model
from protocols.ids import Cid, PeerId
from protocols.pipe.messages import Hop
from tests.adverts import key_of

MODEL = make_model(ModelSpec(), key_of(1), 1)
RELEASE = ServedRelease(Cid("release-1"), "int4", MODEL.manifest, facts_of(MODEL.manifest, "int4"))


@dataclass
class Chain:
    """A chain that can be changed, broken and held up, in the place of the router, the origin and the network."""

    route: str | None = None
    why: str = "layers 3 to 5 are held by nobody"
    failure: Exception | None = None
    takes_s: float = 0.1
    probes: list[float] = field(default_factory=list)  # when each began
    health: Health = field(default_factory=lambda: Health(trio.current_time))

    def __post_init__(self) -> None:
        self.changes = (Changes(), Changes())
        self.appear, self._events = trio.open_memory_channel[PeerEvent](10)
        self.service = ReadinessService(self, self, self, self, self.health)  # type: ignore[arg-type]

    def usual(self) -> tuple[Hop, ...] | NoRoute:
        return NoRoute(self.why, 0) if self.route is None else (Hop(peer=self.route, incarnation=1, first=0, last=1),)

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        return self._events

    def on_lost(self, listener: Callable[[PeerId, str], None]) -> None:
        self.lose = listener

    async def generate(self, _: Request) -> AsyncGenerator[Piece | Receipt, None]:
        self.probes.append(trio.current_time())
        await trio.sleep(self.takes_s)
        if self.failure is not None:
            raise self.failure
        yield Receipt((), (), RELEASE)

    async def set(self, route: str | None) -> None:
        """Change the view, and let the service see it."""
        self.route = route
        await self.touch()

    async def touch(self) -> None:
        self.changes[len(self.probes) % 2].notify()
        await wait_all_tasks_blocked()

    async def says(self, ready: bool, within: float = 30) -> Readiness:
        with trio.fail_after(within):
            while self.service.now.ready != ready:
                await self.service.changes.wait()
        return self.service.now

    def warned(self) -> bool:
        return any(warning.code == "probe-failed" for warning in self.health.current())


@asynccontextmanager
async def running(chain: Chain) -> AsyncIterator[Chain]:
    async with trio.open_nursery() as nursery:
        await nursery.start(chain.service.run)
        await wait_all_tasks_blocked()
        yield chain
        nursery.cancel_scope.cancel()


async def until(seconds: float) -> None:
    """Let virtual time pass."""
    with trio.move_on_after(seconds):
        await trio.sleep_forever()


async def test_nothing_is_ready_before_a_token_has_passed(autojump_clock: MockClock) -> None:
    chain = Chain(route="one")
    assert chain.service.now == Readiness(False, "this node has just started")
    async with running(chain):
        assert not chain.service.now.ready, "the probe is under way"
        with trio.fail_after(1):
            await chain.service.wait_ready()
        assert chain.service.now.ready
        assert chain.service.now.sentence == "a probe token passed through the chain in 100 ms"
        assert chain.service.now.probe_ms == pytest.approx(100)
        assert len(chain.probes) == 1


async def test_without_a_chain_the_reason_is_said_and_nothing_probed(autojump_clock: MockClock) -> None:
    async with running(Chain()) as chain:
        await until(3 * AGAIN_S)
        assert chain.service.now == Readiness(False, "layers 3 to 5 are held by nobody")
        assert chain.probes == []
        await chain.set("one")
        await chain.says(True, within=1)


async def test_the_reason_follows_what_is_missing_now(autojump_clock: MockClock) -> None:
    async with running(Chain(why="the network serves no model yet")) as chain:
        assert chain.service.now.sentence == "the network serves no model yet"
        chain.why = "layers 3 to 5 are held by nobody"
        await chain.touch()
        assert chain.service.now.sentence == "layers 3 to 5 are held by nobody"


async def test_ready_is_taken_back_when_the_chain_breaks(autojump_clock: MockClock) -> None:
    async with running(Chain(route="one")) as chain:
        await chain.says(True)
        await chain.set(None)
        assert chain.service.now == Readiness(False, chain.why)
        await chain.set("two")
        await chain.says(True)
        assert len(chain.probes) == 2


async def test_another_chain_is_probed_at_once(autojump_clock: MockClock) -> None:
    async with running(Chain(route="one")) as chain:
        await chain.says(True)
        chain.failure = Declined("fenced", "bob serves other layers")
        await chain.set("two")
        now = await chain.says(False, within=1)
        assert now.sentence == "the probe failed: bob serves other layers"


async def test_changes_that_do_not_touch_the_chain_cost_nothing(autojump_clock: MockClock) -> None:
    async with running(Chain(route="one")) as chain:
        await chain.says(True)
        for _ in range(50):
            await chain.touch()
        assert len(chain.probes) == 1


async def test_a_change_during_the_probe_is_not_missed(autojump_clock: MockClock) -> None:
    async with running(Chain(route="one", takes_s=5)) as chain:
        await until(1)
        await chain.set("two")
        await until(10)
        assert len(chain.probes) == 2


async def test_an_unchanged_chain_is_probed_once_a_minute(autojump_clock: MockClock) -> None:
    async with running(Chain(route="one")) as chain:
        await until(5 * AGAIN_S)
        assert len(chain.probes) == 5
        chain.failure = PeerUnreachable("the node bob went away")
        await chain.says(False, within=AGAIN_S + 1)
        assert chain.warned() is False, "shown after five seconds"
        await until(6)
        assert chain.warned()
        chain.failure = None
        await chain.says(True, within=30)
        assert not chain.warned()


@pytest.mark.parametrize("before", [False, True])
async def test_failures_are_tried_again_more_and_more_seldom(before: bool, autojump_clock: MockClock) -> None:
    failure = PeerUnreachable("the node bob went away")
    async with running(Chain(route="one", takes_s=0, failure=None if before else failure)) as chain:
        if before:
            chain.failure = failure
            await chain.says(False, within=AGAIN_S + 1)
        first = len(chain.probes) - 1
        await until(400)
        pauses = [round(later - sooner) for sooner, later in pairwise(chain.probes[first:])]
        assert pauses[:9] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_a_probe_that_hangs_has_failed(autojump_clock: MockClock) -> None:
    async with running(Chain(route="one", takes_s=1000)) as chain:
        await until(PROBE_S + 0.5)
        assert chain.service.now.sentence == "the probe failed: no probe token came back within 20 s"
        chain.takes_s = 0
        await chain.says(True, within=2 * PROBE_S)


async def test_a_broken_chain_is_not_ready_until_another_token_has_passed(autojump_clock: MockClock) -> None:
    """The view may go on naming a peer that hangs: its lease lasts longer than its connection."""
    async with running(Chain(route="one")) as chain:
        await chain.says(True)
        chain.failure = PeerUnreachable("no heartbeat")
        chain.lose(PeerId("two"), "no part of the chain")
        assert chain.service.now.ready
        chain.lose(PeerId("one"), "it was killed")
        assert chain.service.now == Readiness(False, "the chain has just broken: one went away: it was killed")
        await until(3)
        assert chain.service.now == Readiness(False, "the probe failed: no heartbeat")
        failed = len(chain.probes)
        await until(20)
        chain.failure = None
        chain.appear.send_nowait(PeerEvent(PeerId("one"), connected=True))
        await chain.says(True, within=0.5)
        assert failed < len(chain.probes) < failed + 6
        probes = len(chain.probes)
        chain.appear.send_nowait(PeerEvent(PeerId("one"), connected=True))
        await until(10)
        assert len(chain.probes) == probes, "what is ready needs no further look"
