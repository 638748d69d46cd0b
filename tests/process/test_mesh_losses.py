"""Nodes that die or hang in the middle of an answer: a clear error in time, and the mesh answers again."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh
from protocols.ids import PeerId, short
from tests.process.mesh_rig import ENDLESS, LAYERS, READY_S, mesh_of, serving, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

BEGUN = 20  # tokens of an answer that is interrupted
KILLED_S = 10.0  # 5 are promised; the rest is for a busy machine
PAUSED_S = 12.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("losses")
    with mesh_of(folder, 3, published=small_model(folder / "model")) as mesh:
        yield mesh


@pytest.fixture
def usual(mesh: Mesh) -> list[int]:
    mesh.wait_ready(READY_S)
    return tokens_of(mesh.members[0])


def strike(asker: Member, victim: Member, number: signal.Signals) -> tuple[str, float]:
    """Send a signal to a node while an answer passes through it; the asker's error, and after how many seconds."""
    answers = asker.client.ask(ENDLESS)
    for _ in range(BEGUN):
        next(answers)
    victim.signal(number)
    began = time.monotonic()
    with pytest.raises(PeerUnreachable) as caught:
        for _ in answers:
            pass
    return str(caught.value), time.monotonic() - began


def answers_again(mesh: Mesh, usual: list[int]) -> None:
    began = time.monotonic()
    for member in mesh.members:
        member.wait_for(lambda s: sorted(serving(s).values()) == [(0, 8), (8, 16), (16, LAYERS)], READY_S, "all")
    mesh.wait_ready(READY_S)
    assert [tokens_of(member) for member in mesh.members] == [usual] * len(mesh.members)
    print(f"answers again after {time.monotonic() - began:.1f} s")


def names(error: str, victim: Member, layers: tuple[int, int]) -> bool:
    return short(PeerId(victim.peer_id)) in error and f"{layers[0]} to {layers[1] - 1}" in error


def test_a_killed_node(mesh: Mesh, usual: list[int]) -> None:
    asker, victim = mesh.members[0], mesh.member("node3")
    layers = serving(asker.status())[victim.peer_id]
    error, seconds = strike(asker, victim, signal.SIGKILL)
    print(f"\nkilled: {seconds:.2f} s: {error}")
    assert names(error, victim, layers)
    assert seconds < KILLED_S
    victim.wait_stopped()
    mesh.up()
    answers_again(mesh, usual)


def test_a_node_that_hangs(mesh: Mesh, usual: list[int]) -> None:
    asker, victim = mesh.members[0], mesh.members[1]
    layers = serving(asker.status())[victim.peer_id]
    error, seconds = strike(asker, victim, signal.SIGSTOP)
    print(f"\npaused: {seconds:.2f} s: {error}")
    assert names(error, victim, layers)
    assert seconds < PAUSED_S
    victim.signal(signal.SIGCONT)
    answers_again(mesh, usual)


def test_a_killed_engine(mesh: Mesh, usual: list[int]) -> None:
    asker, victim = mesh.members[:2]
    layers = serving(asker.status())[victim.peer_id]
    before = victim.status().engine.pid
    answers = asker.client.ask(ENDLESS)
    for _ in range(BEGUN):
        next(answers)
    for process in victim.processes():
        if process.pid == before:
            process.kill()
    began = time.monotonic()
    with pytest.raises((PeerUnreachable, Declined)) as caught:
        for _ in answers:
            pass
    print(f"\nengine killed: {time.monotonic() - began:.2f} s: {caught.value}")
    assert names(str(caught.value), victim, layers)
    assert "engine" in str(caught.value)
    victim.wait_for(lambda s: s.engine is not None and s.engine.pid != before, READY_S, "a new engine")
    answers_again(mesh, usual)
