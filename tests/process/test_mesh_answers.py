"""Three nodes that hold a third of a model each, with engines of their own, and the command lines beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshnode.core.errors import DiskError
from meshnode.harness.mesh import Mesh
from meshnode.harness.receipt import ask
from tests.process.mesh_rig import QUESTION, mesh_of, meshnode, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("thirds")
    with mesh_of(folder, 3, published=small_model(folder / "model")) as mesh:
        yield mesh


def test_three_processes_answer_alike_and_none_imports_torch(mesh: Mesh) -> None:
    usual = tokens_of(mesh.members[0])
    for member in mesh.members:
        receipt = ask(mesh, QUESTION, member)
        assert receipt["token_ids"] == usual
        assert [(hop["first"], hop["last"]) for hop in receipt["route"]] == [(0, 8), (8, 16), (16, 24)]
        assert {hop["name"] for hop in receipt["hops"]} == {"node1", "node2", "node3"}
        assert [node["torch_imported"] for node in receipt["nodes"]] == [False] * 3
        assert all(node["engine_pid"] for node in receipt["nodes"])


def test_the_command_lines(mesh: Mesh) -> None:
    member = mesh.members[1]
    done = meshnode("generate", "w5 w6 w7", "--raw", "--greedy", "--max-tokens", 12, folder=member.folder)
    assert done.code == 0, done.errors
    assert done.out.split() == [f"w{token}" for token in tokens_of(member)]
    status = meshnode("status", folder=member.folder)
    assert status.code == 0
    assert "ready" in status.out and "small-noise" in status.out
    manifest = member.status().model.manifest
    added = meshnode("model", "add", manifest, folder=member.folder)
    assert added.code == 0 and "serves small-noise v1.0.0-0 in int4 already" in added.out, added.errors
    int8 = meshnode("model", "add", manifest, "--variant", "int8", folder=member.folder)
    assert "no variant int8" in int8.sentence()
    unwritable = meshnode("generate", "w1", "--raw", "--json", "/proc/answer", folder=member.folder)
    assert "/proc/answer" in unwritable.sentence()
    assert unwritable.code == DiskError.exit_code


def test_a_harness_that_is_up(mesh: Mesh) -> None:
    sentence = meshnode("harness", "kill", "nosuch", "--dir", mesh.folder).sentence()
    assert "nosuch" in sentence and "node1" in sentence
    assert "already" in meshnode("harness", "up", "--nodes", 2, "--dir", mesh.folder).sentence()
