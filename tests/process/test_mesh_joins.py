"""Nodes of different sizes come and go: they cover the model, a further one helps, one that leaves hands over."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator

import pytest

from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh
from protocols.errors import MeshError
from tests.process.mesh_rig import LAYERS, READY_S, mesh_of, serving, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

LAYER_BYTES = 131_072  # weights and keys and values of one layer of the small model
ENDS_BYTES = 60_000


def room_for(layers: int) -> str:
    return str(layers * LAYER_BYTES + ENDS_BYTES)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Room for 25 of the 24 layers: every node is needed."""
    folder = tmp_path_factory.mktemp("five")
    memory = tuple(room_for(layers) for layers in (3, 4, 5, 6, 7))
    with mesh_of(folder, 5, published=small_model(folder / "model"), memory=memory) as mesh:
        began = max(member.started or 0.0 for member in mesh.members)
        print(f"covered, and probed by every node, {time.time() - began:.1f} s after the last node was started")
        yield mesh


class Asker(threading.Thread):
    """Asks one node again and again until it is stopped; keeps what was answered."""

    def __init__(self, member: Member) -> None:
        super().__init__(daemon=True)
        self.member = member
        self.answers: list[list[int]] = []
        self.errors: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.answers.append(tokens_of(self.member))
            except MeshError as error:
                self.errors.append(str(error))

    def stop(self) -> None:
        self.ended.set()
        self.join(60)
        assert not self.is_alive()


def layers_of(spans: Iterable[tuple[int, int]]) -> set[int]:
    return {layer for span in spans for layer in range(*span)}


def test_five_nodes_cover_the_model(mesh: Mesh) -> None:
    for member in mesh.members:
        spans = serving(member.status())
        assert len(spans) == 5
        assert layers_of(spans.values()) == set(range(LAYERS))


def test_a_sixth_helps_and_a_leaving_one_hands_over(mesh: Mesh) -> None:
    usual = tokens_of(mesh.members[0])
    sixth = mesh.add(room_for(9), (("serve.engine", "null"),))
    began = time.monotonic()
    status = sixth.wait_for(lambda s: s.me.state == "serving", READY_S, "serving layers")
    print(f"the sixth node serves {serving(status)[sixth.peer_id]} after {time.monotonic() - began:.1f} s")
    sixth.wait_ready(READY_S)
    assert tokens_of(sixth) == usual

    asked = mesh.members[0]
    spans = serving(asked.status())
    leaving = next(
        member
        for member in mesh.members[1:5]
        if layers_of([spans[member.peer_id]]) - layers_of(s for p, s in spans.items() if p != member.peer_id)
    )
    asker = Asker(asked)
    asker.start()
    began = time.monotonic()
    process = leaving.process()
    assert process is not None
    process.send_signal(signal.SIGINT)
    process.wait(30)
    took = time.monotonic() - began
    print(f"{leaving.name}, which alone held some of {spans[leaving.peer_id]}, left after {took:.1f} s")
    before = len(asker.answers)
    asked.wait_for(lambda _: len(asker.answers) > before + 2, READY_S, "more answers")
    asker.stop()
    assert not asker.errors
    assert asker.answers == [usual] * len(asker.answers)
    left = serving(asked.status())
    assert leaving.peer_id not in left
    assert layers_of(left.values()) == set(range(LAYERS))
