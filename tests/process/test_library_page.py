"""Every program of docs/library.md runs as it stands, from top to bottom, against a node of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.core.paths import DATA_VARIABLE
from meshnode.harness.member import clean_environment
from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import mesh_of, small_model

pytestmark = [pytest.mark.net, pytest.mark.process]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"
PROGRAMS = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("page")
    with mesh_of(folder, 1, published=small_model(folder / "model", template=TEMPLATE), memory=("1GB",)) as mesh:
        yield mesh


def run(program: str, mesh: Mesh) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**clean_environment(), DATA_VARIABLE: str(mesh.members[0].folder)},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", [n for n, program in enumerate(PROGRAMS) if "open_node" not in program])
def test_program(number: int, mesh: Mesh) -> None:
    assert run(PROGRAMS[number], mesh).strip()
    mesh.members[0].wait_for(lambda status: status.sessions == 0, 30, "the end of every answer")


def test_program_with_a_node_inside(mesh: Mesh) -> None:
    (program,) = [program for program in PROGRAMS if "open_node" in program]
    mesh.down()
    assert run(program, mesh).strip()
    mesh.up()


def test_every_door_and_verb_is_shown() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in ("connect", "aconnect", "open_node", "generate", "stream", "status", "serve", "wait_ready", "stop"):
        assert f"{name}(" in text
