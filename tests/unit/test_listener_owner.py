"""Whose control socket a client speaks to: other users of the machine may have put theirs in its place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshnode.aclient import aconnect
from meshnode.client import Client
from meshnode.core.errors import DiskError, NotRunning
from meshnode.core.paths import Paths

LISTEN = """
import os, socket, sys
if len(sys.argv) > 2: os.setuid(int(sys.argv[2]))
raw = socket.socket(socket.AF_UNIX); raw.bind(sys.argv[1]); raw.listen(); print("listens", flush=True)
while True: peer, _ = raw.accept(); print("heard", peer.recv(100), flush=True)
"""
NOBODY = 65534
root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@contextmanager
def listener(where: Path, user: int | None = None) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", LISTEN, str(where), *([] if user is None else [str(user)])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "listens\n"
        try:
            yield child
        finally:
            child.kill()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder in which everybody may write, as in /tmp."""
    with tempfile.TemporaryDirectory(prefix="m-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


async def both_refuse(folder: Path, words: str) -> None:
    with pytest.raises(DiskError, match=words):
        Client(folder).check()
    with pytest.raises(DiskError, match=words):
        async with aconnect(folder):
            raise AssertionError("it was let in")


@root_only
async def test_nothing_is_said_to_another_user(short: Path) -> None:
    folder = short / "data"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with listener(Paths(folder).control_socket, NOBODY) as child:
        await both_refuse(folder, "is the user nobody and not you, so nothing was said to it")
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["heard b''\n"] * 2


@root_only
async def test_the_owner_of_the_data_folder_may_be_asked_by_root(short: Path) -> None:
    folder = short / "data"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    with listener(Paths(folder).control_socket, NOBODY):
        Client(folder).check()


async def test_nothing_is_said_to_another_user_as_the_kernel_tells(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = short / "data"
    folder.mkdir()
    with listener(Paths(folder).control_socket):
        Client(folder).check()
        monkeypatch.setattr(os, "getuid", lambda: 4711)
        monkeypatch.setattr(Path, "stat", lambda self, **_: os.stat_result((0o40700, 0, 0, 1, 4712, 0, 0, 0, 0, 0)))
        with pytest.raises(DiskError, match="and not you"):
            Client(folder).check()


@pytest.mark.parametrize("fault", ["open to others", "a link", "a file", "another user's"])
async def test_the_folder_for_long_names_must_be_ours_alone(
    short: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder, beside = short / "data", short / "beside"
    if fault == "a link":
        (short / "elsewhere").mkdir(mode=0o700)
        beside.symlink_to(short / "elsewhere")
    elif fault == "a file":
        beside.write_text("")
    else:
        beside.mkdir(mode=0o755 if fault == "open to others" else 0o700)
    monkeypatch.setattr(Paths, "control_socket", property(lambda self: beside / "x.sock"))
    if fault == "another user's":
        monkeypatch.setattr(os, "getuid", lambda: 4711)
    await both_refuse(folder, "not a folder that only you can use: somebody else may listen there")


async def test_a_folder_that_is_ours_is_no_fault(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Paths, "control_socket", property(lambda self: short / "beside" / "x.sock"))
    with pytest.raises(NotRunning):
        Client(short / "data").check()
    (short / "beside").mkdir(mode=0o700)
    with pytest.raises(NotRunning):
        Client(short / "data").check()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.bind(str(short / "beside" / "x.sock"))
        raw.listen()
        Client(short / "data").check()
