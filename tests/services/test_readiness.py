"""Ready is said after a probe token has passed, and taken back when the chain breaks; in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.policy.route import NoRoute
from meshnode.services.inference.origin import Request
from meshnode.services.inference.readiness import AGAIN_SECONDS, PROBE_SECONDS, Readiness, ReadinessService
from protocols.pipe.messages import Token
from tests.services.pipe_mesh import GREEDY, Mesh, open_mesh


@dataclass
class Chain:
    """A chain that can be changed, broken and held up."""

    route: object = None
    why: str = "layers 3 to 5 are held by nobody"
    failure: Exception | None = None
    takes_s: float = 0.1
    probes: list[float] = field(default_factory=list)  # when each began
    health: Health = field(default_factory=lambda: Health(trio.current_time))

    def __post_init__(self) -> None:
        self._event = trio.Event()
        self.service = ReadinessService(
            chain=lambda: (self.route, "" if self.route else self.why),
            changed=self._changed,
            probe=self._probe,
            health=self.health,
        )

    async def _changed(self) -> None:
        await self._event.wait()

    async def _probe(self) -> None:
        self.probes.append(trio.current_time())
        await trio.sleep(self.takes_s)
        if self.failure is not None:
            raise self.failure

    async def set(self, route: object) -> None:
        """Change the view, and let the service see it."""
        self.route = route
        await self.touch()

    async def touch(self) -> None:
        self._event.set()
        self._event = trio.Event()
        await wait_all_tasks_blocked()

    async def says(self, ready: bool, within: float = 30) -> Readiness:
        with trio.fail_after(within):
            while self.service.now.ready != ready:
                await self.service._turned.wait()
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
        await until(3 * AGAIN_SECONDS)
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
        await until(5 * AGAIN_SECONDS)
        assert len(chain.probes) == 5
        chain.failure = PeerUnreachable("the node bob went away")
        await chain.says(False, within=AGAIN_SECONDS + 1)
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
            await chain.says(False, within=AGAIN_SECONDS + 1)
        first = len(chain.probes) - 1
        await until(400)
        pauses = [round(later - sooner) for sooner, later in pairwise(chain.probes[first:])]
        assert pauses[:9] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_a_probe_that_hangs_has_failed(autojump_clock: MockClock) -> None:
    async with running(Chain(route="one", takes_s=1000)) as chain:
        await until(PROBE_SECONDS + 0.5)
        assert chain.service.now.sentence == "the probe failed: no probe token came back within 20 s"
        chain.takes_s = 0
        await chain.says(True, within=2 * PROBE_SECONDS)


# ---------------------------------------------------------------- over a real chain of stages


def watch(mesh: Mesh, number: int, health: Health) -> ReadinessService:
    """Readiness of a member, over its own routes and generations."""
    member = mesh.members[number]

    def chain() -> tuple[object, str]:
        assert mesh.target is not None
        route = mesh.route(member, mesh.target, 0, frozenset())
        return (None, route.reason) if isinstance(route, NoRoute) else (route, "")

    async def probe() -> None:
        async with aclosing(member.generation.generate(Request((1, 1), 1, GREEDY))) as pieces:
            async for _ in pieces:
                pass

    async def changed() -> None:
        async with member.host.events() as events:
            await wait_all_tasks_blocked()
            for _ in member.host.peers:
                events.receive_nowait()
            await events.receive()

    return ReadinessService(chain=chain, changed=changed, probe=probe, health=health)


async def test_a_real_chain_is_ready_and_its_loss_is_named(autojump_clock: MockClock) -> None:
    async with open_mesh() as mesh:
        await mesh.chain(3, 6)
        service = watch(mesh, 3, Health(trio.current_time))
        victim = mesh.members[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            with trio.fail_after(5):
                await service.wait_ready()
            await mesh.freed()
            victim.kill()
            victim.span = None
            await until(1)
            assert service.now == Readiness(False, "layers 3 to 5 are held by nobody, and no node is loading")
            nursery.cancel_scope.cancel()


async def test_a_chain_that_looks_whole_but_does_not_answer_is_not_ready(autojump_clock: MockClock) -> None:
    async with open_mesh() as mesh:
        await mesh.chain(3, 6)
        dead = mesh.members[1]
        dead.engine.dies_after = 0
        service = watch(mesh, 3, Health(trio.current_time))
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            await until(0.5)
            assert not service.now.ready
            assert dead.peer in service.now.sentence
            assert "SIGKILL" in service.now.sentence
            dead.engine.dies_after = None
            await until(10)
            assert service.now.ready
            nursery.cancel_scope.cancel()


async def test_a_lying_stage_costs_readiness_and_not_the_service(autojump_clock: MockClock) -> None:
    async with open_mesh() as mesh:
        await mesh.chain(3, 6)
        last = mesh.members[2]
        service = watch(mesh, 3, Health(trio.current_time))
        send = last.stage._send

        async def lie(peer: object, message: object, body: bytes) -> None:
            if isinstance(message, Token):
                message = replace(message, position=77)
            await send(peer, message, body)  # type: ignore[arg-type]

        last.stage._send = lie  # type: ignore[assignment]
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            await until(5)
            assert not service.now.ready
            assert "broke the rules of the pipe" in service.now.sentence
            nursery.cancel_scope.cancel()


async def test_a_broken_chain_is_not_ready_until_another_token_has_passed(autojump_clock: MockClock) -> None:
    """The view may go on naming a peer that hangs: its lease lasts longer than its connection."""
    async with running(Chain(route="one")) as chain:
        await chain.says(True)
        chain.failure = PeerUnreachable("no heartbeat")
        chain.service.doubt("node2 went away")
        assert chain.service.now == Readiness(False, "the chain has just broken: node2 went away")
        await until(3)
        assert chain.service.now == Readiness(False, "the probe failed: no heartbeat")
        failed = len(chain.probes)
        await until(20)
        chain.failure = None
        chain.service.look_again()
        await chain.says(True, within=0.5)
        assert failed < len(chain.probes) < failed + 6
        probes = len(chain.probes)
        chain.service.look_again()
        await until(10)
        assert len(chain.probes) == probes, "what is ready needs no further look"
