"""Answers of a real node are kept on it, judged by command and library, and survive its end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

import meshnode
from meshnode.core.paths import Paths
from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import mesh_of, small_model
from tests.process.mesh_rig import meshnode as command

pytestmark = [pytest.mark.net, pytest.mark.process]

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("feedback")
    with mesh_of(folder, 1, published=small_model(folder / "model", template=TEMPLATE), memory=("1GB",)) as mesh:
        yield mesh


def test_from_an_answer_to_a_sample(mesh: Mesh) -> None:
    folder = mesh.members[0].folder
    with meshnode.connect(folder) as node:
        answer = node.generate("w5 w6", max_tokens=4, temperature=0)
        assert node.feedback(answer, correct=False, label="w9").label == "w9"
        unkept = node.generate([5, 6], max_tokens=4)
        assert unkept.id == ""
        with pytest.raises(meshnode.errors.BadRequest, match="asked in token ids"):
            node.feedback(unkept, correct=True)
        with pytest.raises(meshnode.errors.BadRequest, match="it takes the number"):
            node.feedback("seven", correct=True)
    ran = command("generate", "w7", "--raw", "--greedy", "--max-tokens", 4, folder=folder)
    number = ran.errors.rpartition("answer ")[2].strip("]\n")
    judged = command("feedback", number, "right", "--json", folder=folder)
    assert json.loads(judged.out) == {"answer": number, "correct": True, "label": ran.out.strip()}
    assert "no answer 999" in command("feedback", "999", "wrong", folder=folder).sentence()
    listed = json.loads(command("data", "--json", folder=folder).out)
    kept = [(sample["input"], sample["label"], sample["correct"]) for sample in listed["samples"]]
    assert kept == [("w7", ran.out.strip(), True), ("w5 w6 ", "w9", False)]
    status = mesh.members[0].status()
    assert (status.samples.labelled, status.samples.judged, status.samples.judged_wrong) == (2, 2, 1)
    assert "samples: 2 to learn from, 2 of them new" in command("status", folder=folder).out


def test_they_are_there_after_kill_9_and_forgotten_while_the_node_runs(mesh: Mesh) -> None:
    member = mesh.members[0]
    member.signal(signal.SIGKILL)
    member.wait_stopped()
    assert Paths(member.folder).samples.stat().st_mode & 0o777 == 0o600
    assert "2 samples" in command("data", folder=member.folder).out
    mesh.up()
    assert "2 samples forgotten" in command("data", "forget", "--all", folder=member.folder).out
    assert member.status().samples.samples == 0
