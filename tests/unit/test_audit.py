"""The audit log: what a node notes, what the commands say, and what happens when it can't be written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.cli.main import main
from meshnode.core.clock import wall_ms
from meshnode.core.health import Health
from meshnode.core.paths import Paths
from meshnode.state.audit import CURRENT, AuditLog, NoAudit, entries_of
from meshnode.state.database import Database
from tests.http_rig import FakeDoor, serving

ASKED = {"messages": [{"role": "user", "content": "a secret"}]}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    with Database(Paths(tmp_path).state) as state:
        yield state


def audit_log(folder: Path, state: Database, *, text: bool = False, health: Health | None = None) -> AuditLog:
    return AuditLog(folder, state, wall_ms, health or Health(), max_bytes=100_000, files=3, text=text)


def noted(folder: Path) -> list[tuple[str, str, str]]:
    return [(entry.fields["via"], entry.fields["who"], entry.fields["what"]) for entry in entries_of(folder)]


async def test_who_asks_over_http_is_noted_and_never_the_text(tmp_path: Path, state: Database) -> None:
    door = FakeDoor()
    door.audit = audit_log(tmp_path, state)
    async with serving(door) as http:
        await http.post("/v1/chat/completions", ASKED)
        await http.get("/healthz")
        await http.get("/v1/models")
        await http.get("/metrics")
    assert noted(tmp_path) == [("http", "a program at 127.0.0.1", "POST /v1/chat/completions")]
    assert b"secret" not in (tmp_path / CURRENT).read_bytes()
    assert (tmp_path / CURRENT).stat().st_mode & 0o777 == 0o600


async def test_the_text_where_the_owner_wants_it(tmp_path: Path, state: Database) -> None:
    door = FakeDoor()
    door.audit = audit_log(tmp_path, state, text=True)
    async with serving(door) as http:
        await http.post("/v1/chat/completions", ASKED)
    first, second = entries_of(tmp_path)
    assert "text" not in first.fields
    assert json.loads(second.fields["text"])["messages"] == ASKED["messages"]


async def test_refusals_are_noted_and_a_flood_of_them_is_counted(tmp_path: Path, state: Database) -> None:
    door = FakeDoor()
    door.audit = log = audit_log(tmp_path, state)
    async with serving(door, keyed=True) as http:
        assert (await http.post("/v1/chat/completions", ASKED)).status_code == 401
    (line,) = noted(tmp_path)
    assert line[2].startswith("refused: POST /v1/chat/completions: this node asks for a key")
    for _ in range(500):
        log.refused("http", "somebody", "nothing")
    log.note("http", "key phone", "a question")
    lines = list(entries_of(tmp_path))
    assert len(lines) < 100
    assert lines[-1].fields["refusals_not_noted"] == 500 - (len(lines) - 2)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], state: Database) -> None:
    data = ("--data", str(tmp_path))
    assert main(["audit", "verify", *data]) == 0
    assert "Nothing was noted yet" in capsys.readouterr().out
    log = audit_log(tmp_path, state)
    for number in range(3):
        log.note("socket", "this device", f"deed {number}\x1b[2J")
    assert main(["audit", "verify", *data]) == 0
    assert capsys.readouterr().out == "3 lines, all as they were written.\n"
    assert main(["audit", "show", "--last", "2", *data]) == 0
    shown = capsys.readouterr().out
    assert "deed 1" in shown and "deed 0" not in shown and "\x1b" not in shown
    assert main(["audit", "show", "--json", *data]) == 0
    assert [line["n"] for line in json.loads(capsys.readouterr().out)] == [1, 2, 3]
    path = tmp_path / CURRENT
    path.write_bytes(path.read_bytes().replace(b"deed 1", b"deed 9"))
    assert main(["audit", "verify", *data]) == 1
    assert "audit.log line 2 was changed: its hash is another." in capsys.readouterr().out
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    assert main(["audit", "verify", "--json", *data]) == 1
    assert "the end is missing" in json.loads(capsys.readouterr().out)["problems"][0]
    assert main(["audit", "show", "--last", "0", *data]) == 2


def test_a_log_that_can_not_be_written_is_told(tmp_path: Path, state: Database) -> None:
    health = Health()
    (tmp_path / CURRENT).mkdir()
    log = audit_log(tmp_path, state, health=health)
    log.note("http", "x", "y")
    (shown,) = health.current()
    assert shown.code == "audit-failed"
    (tmp_path / CURRENT).rmdir()
    log.note("http", "x", "y")
    assert health.current() == []
    NoAudit().note("http", "x", "y")
