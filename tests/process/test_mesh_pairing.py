"""Pairing with the real command line, over real sockets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshnode.harness.member import Member, clean_environment
from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import mesh_of, meshnode, small_model

pytestmark = [pytest.mark.net, pytest.mark.process]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("pairing")
    with mesh_of(folder, 1, published=small_model(folder / "model"), memory=("1GB",)) as mesh:
        yield mesh


@pytest.fixture
def owner(mesh: Mesh) -> Member:
    return mesh.members[0]


@contextmanager
def pairing(owner: Member, *flags: str) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """`meshnode pair` on the owner's device: the PIN and the address that it shows."""
    with subprocess.Popen(
        [sys.executable, "-m", "meshnode", "pair", *flags, "--data", str(owner.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        text=True,
    ) as child:
        assert child.stdout is not None
        pin = address = ""
        while not (pin and address):
            line = child.stdout.readline()
            assert line, child.stderr.read() if child.stderr else ""
            pin = pin or "".join(re.findall(r"PIN is (\d{3} \d{3})\.", line))
            address = address or "".join(re.findall(r"--with (\S+)", line))
        try:
            yield pin, address, child
        finally:
            child.terminate()


def test_a_device_is_let_in_by_the_pin_and_when_the_owner_leaves_nobody_is(owner: Member, tmp_path: Path) -> None:
    with pairing(owner, "--roles", "serve,train") as (pin, address, child):
        ran = meshnode("pair", "--with", address, *pin.split(), "--name", "kitchen", folder=tmp_path)
        assert ran.code == 0, ran.errors
        assert "This node is a member of" in ran.out
        shown, _ = child.communicate(timeout=30)
        assert child.returncode == 0 and "kitchen has got its ticket" in shown
    members = meshnode("members", folder=owner.folder).out
    assert "kitchen" in members and "train" in members
    with pairing(owner) as (pin, address, child):
        child.terminate()
        child.wait(30)
        closed = meshnode("pair", "--with", address, pin, folder=tmp_path / "other")
        assert closed.code == 8 and "lets nobody in by a PIN now" in closed.errors
