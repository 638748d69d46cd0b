"""A ticket as people hand it over: on standard input, in a file, in several words; with the real command line."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.harness.member import clean_environment
from tests.process.mesh_rig import meshnode

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a node that does not run: whoever reads it says so only after it was understood."""
    ran = meshnode("init", "--listen", "/ip4/127.0.0.1/tcp/1", folder=tmp_path_factory.mktemp("owner"))
    assert ran.code == 0, ran.errors
    return next(line.split()[-1] for line in ran.out.splitlines() if "meshnode join " in line)


def understood(code: int, errors: str) -> bool:
    return code == 8 and "can't be reached" in errors


@pytest.mark.parametrize("words", [("-",), ()], ids=["-", "nothing"])
def test_from_standard_input(ticket: str, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshnode", "join", *words, "--data", str(tmp_path)],
        input=f"> {ticket[:70]}\r\n> {ticket[70:]}\r\n".encode(),
        capture_output=True,
        timeout=60,
        env=clean_environment(),
    )
    assert understood(done.returncode, done.stderr.decode()), done.stderr
    assert ticket.encode() not in done.stdout + done.stderr


def test_without_any_standard_input(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m meshnode join --data {tmp_path} <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, env=clean_environment(), text=True)
    assert done.returncode == 2 and "there is no ticket" in done.stderr and "Traceback" not in done.stderr


def test_from_a_file(ticket: str, tmp_path: Path) -> None:
    file = tmp_path / "ticket.txt"
    file.write_bytes(f"\ufeffHere it is:\r\n\r\n  meshnode join {ticket}\r\n".encode())
    ran = meshnode("join", "--ticket-file", file, folder=tmp_path / "data")
    assert understood(ran.code, ran.errors), ran.errors
    assert "either" in meshnode("join", ticket, "--ticket-file", file, folder=tmp_path / "data").sentence()
    nowhere = meshnode("join", "--ticket-file", tmp_path / "nothing", folder=tmp_path / "data").sentence()
    assert "nothing" in nowhere and "No such file" in nowhere


def test_as_several_words(ticket: str, tmp_path: Path) -> None:
    ran = meshnode("join", ticket[:50], ticket[50:], folder=tmp_path)
    assert understood(ran.code, ran.errors), ran.errors


@pytest.mark.parametrize("text", [b"", b"nothing of the kind", b"\xff\xfe\x00", b"meshnode1abc"])
def test_what_holds_no_ticket(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "ticket"
    file.write_bytes(text)
    sentence = meshnode("join", "--ticket-file", file, folder=tmp_path / "data").sentence()
    assert "ticket" in sentence
    assert not (tmp_path / "data").exists(), "nothing is made before the ticket is understood"


def test_pasted_into_a_terminal_in_several_lines(ticket: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "meshnode", "join", "--data", str(tmp_path)],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(),
            text=True,
        ) as child:
            os.write(ours, f"here: {ticket[:300]}\n{ticket[300:]}\n".encode())
            _, errors = child.communicate(timeout=60)  # no end of the input is needed
    finally:
        os.close(ours)
        os.close(theirs)
    assert "Paste the ticket" in errors and understood(child.returncode, errors), errors
