"""Ten real nodes on one machine: what being there costs them, and that work moves and ends nothing."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import NO_COPIES, mesh_of, small_model, tokens_of

pytestmark = [
    pytest.mark.net,
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif("MESHNODE_TEST_LONG" not in os.environ, reason="takes minutes: run by `make test-long`"),
]

NODES = 10
CLIENTS = 4
SETTLED_S, IDLE_S, LOAD_S = 40.0, 60.0, 300.0
MOST_IDLE = 0.01  # of a core each, promised


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("ten")
    settings = (*NO_COPIES, ("serve.layers", 8))
    published = small_model(folder / "model")
    with mesh_of(folder, NODES, published=published, memory=("4MB",), settings=settings) as mesh:
        print(f"\nten nodes answer {mesh.cold_start_s:.1f} s after the first process began")
        yield mesh


def cpu_s(mesh: Mesh) -> float:
    """Processor seconds of every process of the mesh until now."""
    times = [process.cpu_times() for member in mesh.members for process in member.processes()]
    return sum(t.user + t.system for t in times)


def events(mesh: Mesh) -> Counter[str]:
    """How often each event stands in the logs of all nodes."""
    found: Counter[str] = Counter()
    for member in mesh.members:
        for line in member.log.read_text(encoding="utf-8").splitlines():
            if line.startswith("{"):  # a note of the command line stands there as well
                found[json.loads(line).get("event", "")] += 1
    return found


def test_idle_nodes_cost_little(mesh: Mesh) -> None:
    time.sleep(SETTLED_S)
    before = cpu_s(mesh)
    time.sleep(IDLE_S)
    share = (cpu_s(mesh) - before) / IDLE_S / len(mesh.members)
    print(f"\nidle: {share:.2%} of a core each")
    assert share < MOST_IDLE


def test_nobody_moves_or_expires_under_load(mesh: Mesh) -> None:
    right = tokens_of(mesh.members[0])
    before = events(mesh)
    over = threading.Event()

    def ask_on(number: int) -> int:
        count = 0
        while not over.is_set():
            assert tokens_of(mesh.members[number]) == right
            count += 1
        return count

    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask_on, number) for number in range(CLIENTS)]
        over.wait(LOAD_S)
        over.set()
        answers = sum(one.result() for one in asked)
    happened = events(mesh) - before
    moves, expired = happened["intent.announced"], happened["peer.expired"]
    print(f"\n{answers} answers in {LOAD_S:.0f} s; {moves} moves, {expired} peers expired")
    assert (moves, expired) == (0, 0)
