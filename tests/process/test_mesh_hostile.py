"""A hostile member with a plain ticket against five nodes that answer questions.

`HOSTILE_SECONDS` says for how long (`make attack`: five minutes),
`HOSTILE_ATTACKS` which (default: all). The members and the attacker share the processors of one machine, so beside
the time that answers took, which other work spoils, it is printed how much of a processor the members took, all
together, and how much this process did, which attacks.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio

from meshnode.api.messages import Status
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh
from protocols.ids import short
from tests.process.asker import Asked
from tests.process.hostile import Hostile, attacks
from tests.process.insiders import insider
from tests.process.mesh_rig import READY_S, mesh_of, meshnode, small_model, tokens_of

pytestmark = [
    pytest.mark.net,
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif("HOSTILE_SECONDS" not in os.environ, reason="takes minutes: run by `make attack`"),
]

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("HOSTILE_SECONDS", "300"))
CHOSEN = os.environ.get("HOSTILE_ATTACKS", "").split()
NODES = 5
OUT_S = 15.0
EACH_S = max(1.0, SECONDS / 15)
EVERY_S = 0.5  # a question of each node; without a pause the members would use all there is, attacked or not


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    settings = (("serve.layers", 8),)
    published = small_model(tmp_path / "model")
    with mesh_of(tmp_path, NODES, published=published, memory=("4MB",), settings=settings) as mesh:
        yield mesh


@dataclass(frozen=True, slots=True)
class Spell:
    """What some seconds under one attack brought, and cost."""

    asked: list[Asked]
    forged: int
    members: float  # processor seconds a second, of all members with what they have started
    attacker: float  # the same of this process
    seconds: float

    @property
    def answers(self) -> int:
        return sum(not asked.error for asked in self.asked)

    @property
    def median_s(self) -> float:
        """Of the time that an answer took."""
        return statistics.median([asked.took for asked in self.asked if not asked.error] or [math.inf])

    @property
    def answers_per_s(self) -> float:
        return self.answers / self.seconds

    def line(self, attack: str, idle: Spell, usual: Spell) -> str:
        """For people. `extra`: what the members took beside what so many answers take without an attack."""
        failed = len(self.asked) - self.answers
        slower = self.median_s / usual.median_s
        an_answer = (usual.members - idle.members) / usual.answers_per_s
        extra = self.members - idle.members - an_answer * self.answers_per_s
        return (
            f"{attack:<15} {self.answers:4d} answers, {1000 * self.median_s:.0f} ms, {slower:.2f} times as long, "
            f"{failed} failed, {self.forged} forged; "
            f"members {self.members:.3f} s/s, {extra:.3f} extra: {1 + extra / usual.members:.2f} times the usual; "
            f"attacker {self.attacker:.3f} s/s"
        )


async def test_no_node_dies_and_who_it_was_is_named(mesh: Mesh, tmp_path: Path) -> None:
    seed = int(os.environ.get("HOSTILE_SEED", "0")) or random.randrange(1 << 30)
    print(f"HOSTILE_SEED={seed}")
    rng = random.Random(seed)
    right = await trio.to_thread.run_sync(tokens_of, mesh.members[0])
    async with insider(mesh, tmp_path / "guest", ()) as node:
        name = node.identity.peer_id
        idle = await during(mesh, right, name, SECONDS / 3, asking=False)
        usual = await during(mesh, right, name, SECONDS / 3)
        hostile = Hostile(node, rng)
        found: dict[str, Spell] = {}
        chosen = {attack: run for attack, run in attacks(hostile).items() if not CHOSEN or attack in CHOSEN}
        for attack, run in chosen.items():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                found[attack] = await during(mesh, right, name, EACH_S)
                nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            for run in rng.sample(list(chosen.values()), min(4, len(chosen))):
                nursery.start_soon(run)
            found["several at once"] = await during(mesh, right, name, EACH_S)
            nursery.cancel_scope.cancel()
        for attack, spell in {"none": usual, **found}.items():
            print(spell.line(attack, idle, usual))
        assert all(member.process() is not None for member in mesh.members), "no node dies"
        assert all(spell.answers for spell in found.values()), "questions are answered throughout"
        texts = [text for member in mesh.members for text in await trio.to_thread.run_sync(health, member)]
        assert any(name in text or short(name) in text for text in texts), "status names it"
        removed = await trio.to_thread.run_sync(
            partial(meshnode, "members", "remove", name, folder=mesh.members[0].folder)
        )
        assert removed.code == 0, removed.errors
        for member in mesh.members:
            gone = partial(member.wait_for, partial(not_connected, name), OUT_S, "putting it out")
            await trio.to_thread.run_sync(gone)
    for member in mesh.members:
        member.wait_ready(READY_S)
        assert tokens_of(member) == right


async def during(mesh: Mesh, right: list[int], hostile: str, seconds: float, *, asking: bool = True) -> Spell:
    """So many seconds of questions to every node, while whatever runs beside this runs."""
    ours, theirs = time.process_time(), spent(mesh)
    began = time.monotonic()
    if asking:
        lines = await asked_during(mesh, seconds)
    else:
        lines = b""
        await trio.sleep(seconds)
    took = time.monotonic() - began
    members, attacker = (spent(mesh) - theirs) / took, (time.process_time() - ours) / took
    asked = [Asked(**json.loads(line)) for line in lines.splitlines()]
    wrong = [a for a in asked if not a.error and list(a.tokens) != right]
    assert all(hostile in a.route for a in wrong), "a wrong token from an honest route"
    return Spell(asked, len(wrong), members, attacker, took)


async def asked_during(mesh: Mesh, seconds: float) -> bytes:
    """What `tests.process.asker` says in that time."""
    command = [sys.executable, "-m", "tests.process.asker", str(EVERY_S), *(str(m.folder) for m in mesh.members)]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    lines = await process.stdout.receive_some()  # the first answer: it has started
    with trio.move_on_after(seconds):
        async for data in process.stdout:
            lines += data
    process.kill()
    await process.wait()
    return bytes(lines[: lines.rfind(b"\n") + 1])


def spent(mesh: Mesh) -> float:
    """Processor seconds of all members so far, with what they have started."""
    total = 0.0
    for process in (process for member in mesh.members for process in member.processes()):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def health(member: Member) -> list[str]:
    return [warning.text for warning in member.status().health]


def not_connected(peer: str, status: Status) -> bool:
    return not any(row.peer == peer and row.connected for row in status.peers)
