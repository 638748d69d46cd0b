"""Roll-outs between real directory services: proposed, judged, released, taken back; what a restart keeps."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined, DiskError, ModelError
from meshnode.core.signal import Changes
from meshnode.services.port import Comparison, Releases
from meshnode.services.rollout.electorate import Electorate
from meshnode.services.rollout.service import NoJudge, RolloutService, RolloutSettings
from meshnode.state.memory_state import MemoryState
from meshnode.state.rollout import remembered
from protocols.notice.messages import BALLOT
from protocols.rollout.events import Pace
from protocols.rollout.messages import Candidate
from protocols.rollout.state import Phase
from tests.rollouts import SERVED, block
from tests.services.directory_mesh import Mesh, Node, open_mesh

ROLES = ("serve", "train", "vote")
ONE = block("one")
FRAME = block("frame")
PACE = Pace(collect_s=20, soak_s=20, report_s=5, retry_s=10)


class Served:
    """`Releases` of services/port.py: always the same model."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.current = SimpleNamespace(cid=SERVED.base, manifest=SimpleNamespace(version=SERVED.version))
        self.previous = None
        self.why_none = ""


class Judge:
    """`Judge` of services/port.py, who knows what adapters are worth."""

    def __init__(self, worth: dict[str, float]) -> None:
        self.changes = Changes()
        self.suite = SERVED.suite
        self.worth = worth
        self.seeds: list[int] = []
        self.fails = False

    async def compare(self, candidate: Candidate, seed: int) -> Comparison:
        await trio.sleep(5)
        if self.fails:
            raise ModelError("its frame does not fit the model")
        self.seeds.append(seed)
        return Comparison(samples=64, loss_new=0.5 + self.worth[candidate.adapter], loss_old=0.5, ci95=0.001)


@dataclass(slots=True)
class Member:
    node: Node
    judge: Judge
    service: RolloutService
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def phase(self) -> Phase | None:
        known = self.service.releases()
        return known[0].phase if known else None

    def health(self) -> dict[str, str]:
        return {shown.code: shown.text for shown in self.node.health.current()}


class Town:
    """A mesh of directory services, each with a roll-out."""

    def __init__(self, mesh: Mesh, nursery: trio.Nursery) -> None:
        self.mesh = mesh
        self.worth = {ONE: -0.02}
        self.members: list[Member] = []
        self._nursery = nursery

    async def start(self, *roles_of_each: tuple[str, ...]) -> list[Member]:
        """Nodes 1, 2, ..., connected in a row; those that ran before go on with what they remember."""
        nodes = [await self.mesh.start(number, roles=roles) for number, roles in enumerate(roles_of_each, 1)]
        await self.mesh.line(*nodes)
        self.members = [self._member(node) for node in nodes]
        for member in self.members:
            await self._nursery.start(self._run, member)
        return self.members

    def _member(self, node: Node) -> Member:
        judge = Judge(self.worth)
        directory = node.directory
        service = RolloutService(
            directory.notices,
            Electorate(directory.notices, directory, self.mesh.members, node.health),
            cast(Releases, Served()),
            judge,
            self.mesh.states[node.number],
            node.health,
            RolloutSettings(us=node.peer, pace=PACE),
        )
        return Member(node, judge, service)

    async def _run(self, member: Member, *, task_status: trio.TaskStatus[None]) -> None:
        with member.scope:
            await member.service.run(task_status=task_status)

    async def stop(self) -> None:
        for member in self.members:
            member.scope.cancel()
            await member.node.stop()

    async def until(self, check: Callable[[Member], Any], within: float = 600) -> None:
        """Until it is so at every member."""
        with trio.fail_after(within):
            for member in self.members:
                version = member.service.changes.version
                while not check(member):
                    version = await member.service.changes.wait(version)


@pytest.fixture
async def town(rng: random.Random) -> AsyncIterator[Town]:
    async with open_mesh(rng) as mesh, trio.open_nursery() as nursery:
        yield Town(mesh, nursery)
        nursery.cancel_scope.cancel()


async def test_what_is_better_answers_everywhere_in_the_end(town: Town, autojump_clock: MockClock) -> None:
    members = await town.start(ROLES, ROLES, ROLES, ("serve",))
    candidate = members[0].service.propose(ONE, SERVED.base, FRAME, round=3)
    assert candidate.version == "v1.0.0-1" and candidate.previous == ""
    await town.until(lambda member: member.phase is Phase.RELEASED)
    assert [member.service.current(SERVED.base) for member in members] == [ONE] * 4
    assert {member.service.current(block("another model")) for member in members} == {None}
    seeds = [seed for member in members for seed in member.judge.seeds]
    assert len(set(seeds)) == 3 and not members[3].judge.seeds
    town.worth[block("two")] = -0.02
    assert members[1].service.propose(block("two"), SERVED.base, FRAME).previous == ONE
    await town.until(lambda member: member.service.current(SERVED.base) == block("two"))


async def test_what_is_worse_is_used_by_nobody_and_not_after_a_restart(town: Town, autojump_clock: MockClock) -> None:
    town.worth[ONE] = 0.05
    members = await town.start(ROLES, ROLES, ROLES)
    members[0].service.propose(ONE, SERVED.base, FRAME)
    await town.until(lambda member: member.phase is Phase.REVOKED)
    await town.stop()
    town.worth[ONE] = -0.5
    members = await town.start(ROLES, ROLES, ROLES)
    with pytest.raises(Declined, match=r"was revoked and can't be proposed again: \d of 3 voters revoked it"):
        members[1].service.propose(ONE, SERVED.base, FRAME)
    assert {member.service.current(SERVED.base) for member in members} == {None}


async def test_what_fails_in_use_is_taken_back_everywhere(town: Town, autojump_clock: MockClock) -> None:
    members = await town.start(ROLES, ROLES, ROLES)
    members[0].service.propose(ONE, SERVED.base, FRAME)
    await town.until(lambda member: member.phase is Phase.RELEASED)
    for member in members[:2]:
        for _ in range(20):
            member.service.answered(ONE)
        for _ in range(10):
            member.service.corrected(ONE)
        assert member.service.using is None
    await town.until(lambda member: member.phase is Phase.REVOKED)
    assert {member.service.current(SERVED.base) for member in members} == {None}
    said = members[2].health()["adapter-rolled-back"]
    assert "v1.0.0-1" in said and "too many of its answers were wrong" in said and "The model alone answers" in said


async def test_a_person_takes_it_back(town: Town, autojump_clock: MockClock) -> None:
    members = await town.start(ROLES, ROLES, ROLES, ("serve",))
    members[0].service.propose(ONE, SERVED.base, FRAME)
    await town.until(lambda member: member.phase is Phase.RELEASED)
    release = members[3].service.roll_back("", "not mine")
    assert release.phase is Phase.LEFT and members[3].service.using is None
    with pytest.raises(Declined, match="No adapter is used here"):
        members[3].service.roll_back("", "not mine")
    with pytest.raises(Declined, match=r"No release 'v9' is known here; there are: v1.0.0-1"):
        members[0].service.roll_back("v9", "")
    town.mesh.members.founders.add(members[0].node.peer)
    town.mesh.members.changes.notify()
    members[0].service.roll_back("v1.0.0-1", "it insults people")
    await town.until(lambda member: member.phase is Phase.REVOKED)
    assert "the network's owner took it back: it insults people" in members[2].service.releases()[0].why


async def test_roles_are_asked_for(town: Town, autojump_clock: MockClock) -> None:
    members = await town.start(("serve", "vote"), ROLES, ROLES)
    with pytest.raises(Declined, match=r"lacks the role train.*--roles serve,train"):
        members[0].service.propose(ONE, SERVED.base, FRAME)
    with pytest.raises(Declined, match="it is for another model release"):
        members[1].service.propose(ONE, block("another model"), FRAME)
    assert members[1].service.propose(ONE, SERVED.base, FRAME)
    await town.until(lambda member: member.phase is Phase.OPEN)


async def test_what_can_not_be_judged_is_told_and_tried_again(town: Town, autojump_clock: MockClock) -> None:
    members = await town.start(ROLES, ROLES, ROLES)
    members[2].judge.fails = True
    members[0].service.propose(ONE, SERVED.base, FRAME)
    await town.until(
        lambda member: member.service.releases() and len(member.service.releases()[0].counted.voted) == 2
    )
    assert "its frame does not fit the model" in members[2].health()["adapter-not-judged"]
    members[2].judge.fails = False
    await town.until(lambda member: member.phase is Phase.RELEASED)
    assert "adapter-not-judged" not in members[2].health()


async def test_words_that_can_not_be_read_do_not_count(town: Town, autojump_clock: MockClock) -> None:
    members = await town.start(ROLES, ROLES, ROLES)
    members[0].node.directory.notices.give(BALLOT, b"\xff\xff")
    members[1].service.propose(ONE, SERVED.base, FRAME)
    await town.until(
        lambda member: member.phase is Phase.OPEN and len(member.service.releases()[0].counted.voted) > 0
    )
    assert "(ballot) can't be used" in members[1].health()["release-words"]


def test_a_memory_that_can_not_be_read_stops_the_node() -> None:
    state = MemoryState()
    state.put_record("rollout", "rollout", b"\xff")
    with pytest.raises(DiskError, match="can't be read"):
        remembered(state)


async def test_a_node_without_a_trainer_says_so() -> None:
    with pytest.raises(Declined, match="no trainer"):
        await NoJudge().compare(cast(Candidate, None), 0)
