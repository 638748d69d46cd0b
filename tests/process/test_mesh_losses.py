"""Nodes that die or hang in the middle of an answer: it goes on when they are back, and the mesh answers again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from meshnode.api.messages import Replaced
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import LAYERS, QUESTION, READY_S, mesh_of, serving, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

BEGUN = 20  # tokens of an answer that is interrupted
PAUSED_S = 12.0  # a silent node is given up after 5; the rest is for a busy machine
LONG = replace(QUESTION, max_tokens=300)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("losses")
    with mesh_of(folder, 3, published=small_model(folder / "model")) as mesh:
        yield mesh


@pytest.fixture
def usual(mesh: Mesh) -> list[int]:
    mesh.wait_ready(READY_S)
    return list(mesh.members[0].client.ask(LONG).whole().token_ids)


def strike(asker: Member, victim: Member, blow: Callable[[], object], usual: list[int]) -> Replaced:
    """Have something happen to a node while an answer passes through it; how the answer went on without it."""
    layers = serving(asker.status())[victim.peer_id]
    answers = asker.client.ask(LONG)
    for _ in range(BEGUN):
        next(answers)
    blow()
    answer = answers.whole()
    assert list(answer.token_ids) == usual
    (replaced,) = answer.receipt.replaced
    print(f"\n{replaced}")
    assert (replaced.peer, replaced.first, replaced.last) == (victim.peer_id, *layers)
    assert BEGUN <= replaced.tokens < len(usual)
    return replaced


def answers_again(mesh: Mesh, usual: list[int]) -> None:
    began = time.monotonic()
    for member in mesh.members:
        member.wait_for(lambda s: sorted(serving(s).values()) == [(0, 8), (8, 16), (16, LAYERS)], READY_S, "all")
    mesh.wait_ready(READY_S)
    assert [tokens_of(member) for member in mesh.members] == [usual[: QUESTION.max_tokens]] * len(mesh.members)
    print(f"answers again after {time.monotonic() - began:.1f} s")


def test_a_killed_node(mesh: Mesh, usual: list[int]) -> None:
    """All three are needed, so the answer waits until it is back."""
    asker, victim = mesh.members[0], mesh.member("node3")

    def blow() -> None:
        victim.signal(signal.SIGKILL)
        victim.wait_stopped()
        mesh.up()

    strike(asker, victim, blow, usual)
    answers_again(mesh, usual)


@pytest.mark.long
def test_a_node_that_hangs(mesh: Mesh, usual: list[int]) -> None:
    asker, victim = mesh.members[0], mesh.members[1]
    wakes = threading.Timer(PAUSED_S, victim.signal, (signal.SIGCONT,))

    def blow() -> None:
        victim.signal(signal.SIGSTOP)
        wakes.start()

    replaced = strike(asker, victim, blow, usual)
    wakes.join()
    assert replaced.gap_ms > 1000, "it was given up, and asked again when it was back"
    answers_again(mesh, usual)


def test_a_killed_engine(mesh: Mesh, usual: list[int]) -> None:
    asker, victim = mesh.members[:2]
    before = victim.status().engine.pid

    def blow() -> None:
        for process in victim.processes():
            if process.pid == before:
                process.kill()

    assert "engine" in strike(asker, victim, blow, usual).reason
    assert victim.status().engine.pid != before
    answers_again(mesh, usual)
