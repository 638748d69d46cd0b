"""Stopping a node, and what keeps one from starting."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from meshnode.cli.invite import make_ticket
from meshnode.core.errors import NodeError
from meshnode.harness.member import Member, clean_environment
from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import ENDLESS, READY_S, mesh_of, meshnode, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

ULIMIT_KIB = 200  # the size that a file of the short node may have


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("stops")
    published = small_model(folder / "model", layer_bytes=1 << 19)
    with mesh_of(folder, 2, published=published, memory=("1GB",)) as mesh:
        yield mesh


@pytest.fixture
def server(mesh: Mesh) -> Member:
    """The node that serves the model now; there is room for it on each."""
    mesh.up()
    mesh.wait_ready(READY_S)
    return next(member for member in mesh.members if member.status().engine)


def test_meshnode_stop(server: Member) -> None:
    processes = server.processes()
    assert len(processes) == 2, "a node and its engine"
    assert meshnode("stop", folder=server.folder).code == 0
    for process in processes:
        process.wait(READY_S)
    assert "node.stopped" in server.last_words()
    assert "No node runs" in meshnode("stop", folder=server.folder).sentence()


def test_the_second_signal_stops_at_once(server: Member) -> None:
    """The first one waits for the session that is open; the second does not."""
    answers = server.client.ask(ENDLESS)
    for _ in range(20):
        next(answers)
    processes = server.processes()
    processes[0].send_signal(signal.SIGINT)
    server.wait_for(lambda s: s.me.state == "draining", READY_S, "leaving")
    next(answers)
    assert server.process() is not None, "an answer is under way"
    processes[0].send_signal(signal.SIGINT)
    for process in processes:
        process.wait(5)
    with pytest.raises(NodeError):
        for _ in answers:
            pass


def test_a_second_node_on_the_same_folder(server: Member) -> None:
    sentence = meshnode("start", folder=server.folder).sentence()
    assert "already runs" in sentence
    assert str(server.folder) in sentence
    assert server.status().ready


@pytest.mark.long
def test_a_disk_that_takes_no_layer(mesh: Mesh, tmp_path: Path) -> None:
    """Files that grow too big, as on a full disk: the node says so, serves nothing and goes on answering."""
    mesh.up()
    mesh.wait_ready(READY_S)
    folder = tmp_path / "short"
    founder = mesh.members[0]
    ticket = make_ticket(founder.folder, uses=1, ttl_s=600, addresses=[founder.address])
    assert meshnode("join", ticket, "--listen", "/ip4/127.0.0.1/tcp/0", folder=folder).code == 0
    command = f"ulimit -f {ULIMIT_KIB}; exec {sys.executable} -m meshnode start --engine null --data {folder}"
    log = tmp_path / "log"
    with log.open("wb") as errors:
        child = subprocess.Popen(
            ["bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=clean_environment(),
        )
    short = Member("short", folder, "", "", pid=child.pid, started=psutil.Process(child.pid).create_time())
    try:
        short.wait_answers()
        status = short.wait_for(lambda s: any(w.code == "span-failed" for w in s.health), READY_S, "a warning")
        text = next(w.text for w in status.health if w.code == "span-failed")
        assert "does not allow files of this size" in text
        assert str(folder) in text
        assert tokens_of(short) == tokens_of(founder)
        assert "Traceback" not in log.read_text()
    finally:
        child.terminate()
        child.wait(30)
    assert child.returncode == 0


def test_a_signal_during_the_start_ends_it_without_a_traceback(tmp_path: Path) -> None:
    """At the first line that it logs, and at the line that says that it runs."""
    assert meshnode("init", "--listen", "/ip4/127.0.0.1/tcp/0", folder=tmp_path).code == 0
    for awaited in ("", "meshnode runs as"):
        child = subprocess.Popen(
            [sys.executable, "-m", "meshnode", "start", "--data", str(tmp_path), "--log-level", "debug"],
            stderr=subprocess.PIPE,
            env=clean_environment(),
            text=True,
        )
        assert child.stderr is not None
        assert any(awaited in line for line in child.stderr)
        child.terminate()
        _, said = child.communicate(timeout=60)
        assert (child.returncode, "Traceback" in said) == (0, False), said
