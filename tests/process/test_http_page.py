"""Every program of docs/http.md runs as it stands against a node; a node that others can reach wants a key."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from meshnode.harness.member import clean_environment
from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import mesh_of, meshnode, small_model

pytestmark = [pytest.mark.net, pytest.mark.process]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "http.md"
PROGRAMS = re.findall(r"(?ms)^```(python|bash)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("page")
    with mesh_of(folder, 1, published=small_model(folder / "model", template=TEMPLATE), memory=("1GB",)) as mesh:
        yield mesh


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_program(number: int, mesh: Mesh) -> None:
    kind, program = PROGRAMS[number]
    command = ["bash", "-ec", program] if kind == "bash" else [sys.executable, "-c", program]
    done = subprocess.run(
        command,
        env={**clean_environment(), "MESHNODE_URL": mesh.members[0].api_url},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"w\d+", done.stdout), done.stdout


def test_where_others_can_reach_it_a_key_is_needed(mesh: Mesh) -> None:
    folder = mesh.members[0].folder
    mesh.down()
    reachable = {"MESHNODE_HTTP__LISTEN": "0.0.0.0:0"}
    refused = meshnode("start", folder=folder, **reachable)
    assert (refused.code, "meshnode key add NAME" in refused.sentence()) == (2, True)
    key = meshnode("key", "add", "me", folder=folder).out.splitlines()[0]
    mesh.up()
    mesh.wait_ready()
    assert openai.OpenAI(base_url=mesh.members[0].api_url + "/v1", api_key=key).models.list().data
